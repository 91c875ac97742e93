"""Generation in padded batches, for models whose rows cannot be in flight at tokens of their own.

These are models without position ids (ALiBi), with windows shorter than the text, with recurrent states or capped
scores; all others are answered by :mod:`pocl.evaluation.continuous_batching`. Padding must not enter a recurrent state,
and not every family keeps it out: a model is tried before (:func:`can_decode_padded`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedModel

from pocl.callbacks import ShouldStop
from pocl.errors import RunStopped
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.question import Question
from pocl.evaluation.repeated_ngrams import RepeatedNgrams
from pocl.evaluation.sampling import Sampler
from pocl.models.growing_cache import GrowingCache, growing_cache
from pocl.models.heads import restrict_head
from pocl.models.positions import cache_argument, position_arguments
from pocl.models.rounding import difference_beyond_rounding
from pocl.out_of_memory import is_out_of_memory

_MAX_ACTIVE_SHARE = 0.75
"""Finished rows leave their batch once at most this share of it is active: leaving copies the cache."""


_PROBE_LENGTHS = (12, 5, 9)
"""Tokens of the rows that :func:`can_decode_padded` tries."""
_PROBE_STEPS = 3
"""Of these tokens are read one by one."""
_STATE_ROUNDING = 20
"""How much further than other logits those from a recurrent state may round: it sums in another order than a text that
is read at once."""


def can_decode_padded(model: PreTrainedModel, *, together: bool) -> bool:
    """Whether rows that are padded and decoded with a cache get the logits that each gets by itself, read at once.

    The model is tried as it is: in eval mode, and with the weights that it has now; one that fails cannot.

    Args:
        together: Rows of several lengths in one batch, from which one is dropped; else each in a batch of its own.
    """
    try:
        return _agrees(model, together=together)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A model may fail in any way; it is then answered without a cache, as all can be.
        return False


def _agrees(model: PreTrainedModel, *, together: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    rows = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in _PROBE_LENGTHS]
    for batch in [rows] if together else [[row] for row in rows]:
        questions = [Question(row[:-_PROBE_STEPS], _PROBE_STEPS + 1, "") for row in batch]
        expected = [_logits_by_itself(model, row) for row in batch]
        probe = _Batch.start(model, questions, pad_id=0)
        actual = []
        with restrict_head(model, lambda hidden: hidden[:, -1:]):
            for step in range(_PROBE_STEPS + 1):
                logits = _next_logits(model, probe).float()
                actual.append((logits, torch.stack([expected[slot][step] for slot in probe.slots])))
                if step == _PROBE_STEPS:
                    break
                tokens = [batch[slot][step - _PROBE_STEPS] for slot in probe.slots]
                # From now on its row is padding, and it leaves the batch.
                probe.finished |= {1} if step == 1 and together else set()
                probe.append(torch.tensor(tokens, device=model.device))
        is_exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
        if any(difference_beyond_rounding(*pair, is_exact=is_exact, growth=_STATE_ROUNDING) for pair in actual):
            return False
    return True


def _logits_by_itself(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """The logits after the last tokens of a row, read at once, `[steps + 1, V]`."""
    ids = torch.tensor([row], device=model.device)
    mask = torch.ones_like(ids)
    logits: torch.Tensor = model(
        input_ids=ids, attention_mask=mask, use_cache=False, **position_arguments(model, mask)
    ).logits
    return logits[0, -_PROBE_STEPS - 1 :].float()


def answer_padded(
    model: PreTrainedModel,
    questions: Sequence[Question],
    decoding: Decoding,
    on_answer: Callable[[int, list[int]], None],
    should_stop: ShouldStop,
    on_partial: Callable[[int, list[int]], None] = lambda *_: None,
) -> None:
    """Answer questions in batches of the rows in flight, in the order given.

    `on_answer` is called with each one's index and new tokens once its batch is done, and `on_partial` at each token
    with the tokens so far of each that goes on.

    Raises:
        RunStopped: `should_stop`, polled before each token, returned true.
    """
    for start in range(0, len(questions), decoding.rows_in_flight):
        asked = questions[start : start + decoding.rows_in_flight]
        batch = _Batch.start(model, asked, decoding.pad_id)
        if decoding.sampler is not None:
            batch.use_sampler(decoding.sampler, [question.key for question in asked])
        if decoding.no_repeat_ngram is not None:
            batch.ban_repeats(decoding.no_repeat_ngram, [question.prompt for question in asked])
        on_token = partial(_report_partial, on_partial, start)
        for offset, answer in enumerate(_decode(model, batch, decoding, should_stop, on_token)):
            on_answer(start + offset, answer)


@dataclass
class _Batch:
    """Prompts that are being answered, as the B rows of some tensors, from which finished rows are dropped together.

    A slot is the index of a prompt in the batch at its start; rows change their index, slots do not.
    """

    slots: list[int]
    """The slot of each row."""
    limits: list[int]
    """The most tokens of the answer in each slot."""
    input_ids: torch.Tensor
    """The tokens that the model has not read yet: the prompts, `[B, L]`, then one token for each row, `[B, 1]`."""
    mask: torch.Tensor
    """`[B, L + longest answer]`: 1 at prompt and answer, 0 at padding, after the end of an answer and ahead."""
    width: int
    """The columns of `mask` in use."""
    cache: GrowingCache
    finished: set[int] = field(default_factory=set)
    """The slots whose answer has ended."""
    sampler: Sampler | None = None
    uniforms: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """The random numbers of a sampler, `[B, longest answer]`; empty without one."""
    repeats: RepeatedNgrams | None = None
    """What bans repeated n-grams; None where none are banned."""

    @classmethod
    def start(cls, model: PreTrainedModel, questions: Sequence[Question], pad_id: int) -> "_Batch":
        """Pad prompts on the left, so that all answers begin in the same column."""
        prompts = [question.prompt for question in questions]
        limits = [question.limit for question in questions]
        width = max(map(len, prompts))
        padded = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        mask = torch.zeros(len(prompts), width + max(limits), dtype=torch.long, device=model.device)
        mask[:, :width] = torch.tensor(real, device=model.device)
        return cls(
            slots=list(range(len(prompts))),
            limits=limits,
            input_ids=torch.tensor(padded, device=model.device),
            mask=mask,
            width=width,
            cache=growing_cache(model.config, mask.shape[1]),
        )

    def use_sampler(self, sampler: Sampler, keys: Sequence[str]) -> None:
        """Let `sampler` draw the tokens; there is one key for each row."""
        self.sampler = sampler
        self.uniforms = sampler.uniforms(keys, max(self.limits)).to(self.input_ids.device)

    def ban_repeats(self, size: int, prompts: Sequence[Sequence[int]]) -> None:
        """Let no answer repeat an n-gram of this size."""
        self.repeats = RepeatedNgrams.empty(size, len(prompts), self.mask.shape[1], self.input_ids.device)
        self.repeats.begin(range(len(prompts)), prompts)

    def choose(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """The next token of each row, `[B, V]` -> `[B]`; `step` is the number of tokens before it."""
        if self.repeats is not None:
            logits = self.repeats.banned(logits)
        chosen = logits.argmax(dim=-1) if self.sampler is None else self.sampler.choose(logits, self.uniforms[:, step])
        if self.repeats is not None:
            self.repeats.append(chosen, torch.ones_like(chosen, dtype=torch.bool))
        return chosen

    def append(self, tokens: torch.Tensor) -> None:
        """Append one token to each row, and drop finished rows where that pays."""
        is_active = [slot not in self.finished for slot in self.slots]
        self.input_ids = tokens.unsqueeze(1)
        # The position of a finished row does not advance: no row outruns the model's positions.
        self.mask[:, self.width] = torch.tensor(is_active, device=self.mask.device)
        self.width += 1
        if sum(is_active) <= _MAX_ACTIVE_SHARE * len(is_active):
            self._select([row for row, active in enumerate(is_active) if active])

    def _select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, dtype=torch.long, device=self.input_ids.device)
        self.slots = [self.slots[row] for row in rows]
        self.input_ids = self.input_ids[index]
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)
        if self.sampler is not None:
            self.uniforms = self.uniforms[index]
        if self.repeats is not None:
            self.repeats = self.repeats.select(index)


def _report_partial(on_partial: Callable[[int, list[int]], None], start: int, slot: int, answer: list[int]) -> None:
    on_partial(start + slot, list(answer))


def _decode(
    model: PreTrainedModel,
    batch: _Batch,
    decoding: Decoding,
    should_stop: ShouldStop,
    on_token: Callable[[int, list[int]], None],
) -> list[list[int]]:
    stop_text, eos_token_ids = decoding.stop_text, decoding.eos_token_ids
    answers: list[list[int]] = [[] for _ in batch.slots]
    # The head is applied to the last column alone, also while the prompts are read (prefill).
    with restrict_head(model, lambda hidden: hidden[:, -1:]):
        for step in range(max(batch.limits)):
            if should_stop():
                raise RunStopped()
            tokens = batch.choose(_next_logits(model, batch), step)
            for slot, token in zip(batch.slots, tokens.tolist(), strict=True):
                if slot in batch.finished:
                    continue
                if token not in eos_token_ids:
                    answers[slot].append(token)
                is_last = token in eos_token_ids or len(answers[slot]) == batch.limits[slot]
                if is_last or (stop_text is not None and stop_text.length_with(answers[slot], step) is not None):
                    batch.finished.add(slot)
                else:
                    on_token(slot, answers[slot])
            if len(batch.finished) == len(answers):
                break
            batch.append(tokens)
    return answers


def _next_logits(model: PreTrainedModel, batch: _Batch) -> torch.Tensor:
    """The logits of the next token of each row, `[B, V]`."""
    mask = batch.mask[:, : batch.width]
    positions = position_arguments(model, mask)
    unread = batch.input_ids.shape[1]
    cache_name = cache_argument(model)
    if cache_name != "past_key_values":
        # State-space models mask the tokens that enter their state, and have no others.
        mask = mask[:, -unread:]
    output = model(
        input_ids=batch.input_ids,
        attention_mask=mask,
        use_cache=True,
        **({} if cache_name is None else {cache_name: batch.cache}),
        **{name: value[:, -unread:] for name, value in positions.items()},
    )
    logits: torch.Tensor = output.logits[:, -1]
    return logits
