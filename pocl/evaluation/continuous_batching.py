"""Continuous batching: rows in flight, each at a token of its own, and a waiting prompt in place of each that ends.

Waiting prompts are read packed (prefill), and their keys and values scattered into free slots of a static cache
(:mod:`pocl.models.slot_cache`). A decode step then gives one token to every slot, by a fixed number of operators: all
that it needs stands on the device and is advanced there. The host looks at what has ended every :data:`LOOK_EVERY`
steps; a row that has ended in between goes on within its slot, and what it says is dropped.

What the bits of an answer depend on besides its prompt: on a CPU each prompt is read by itself, attention is per row
and buckets change nothing, so it is the products alone. In bf16 those of up to 16 rows round each row alike, however
many there are (a test holds it on machines that multiply bf16); in fp32 the rounding depends on the number of slots,
which is halved while the last rows end. On CUDA it was not measured. What must be repeated to the bit is therefore
generated in batches that are whole.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.callbacks import ShouldStop
from pocl.errors import RunStopped
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.question import Question
from pocl.evaluation.repeated_ngrams import RepeatedNgrams
from pocl.evaluation.sampling import Sampler
from pocl.models.slot_cache import bucket_of, decode_attention
from pocl.models.slot_decoder import SlotDecoder
from pocl.models.step_graphs import StepGraphs

LOOK_EVERY = 8
"""Decode steps between two looks of the host at which answers have ended: each look waits for the device."""
_PREFILL_TOKENS = {"cuda": 8192}
"""Tokens of the prompts that are read together, unless one is longer; elsewhere each prompt is read by itself, so that
its bits follow from it alone."""


class ContinuousBatching:
    """Answers questions with one model; to be used under :func:`~pocl.models.inference_weights.inference_weights`."""

    def __init__(
        self,
        model: PreTrainedModel,
        questions: Sequence[Question],
        decoding: Decoding,
    ) -> None:
        """Prepare slots for the questions; with graphs, each bucket of lengths has one of its own."""
        self._model = model
        self._questions = questions
        self._sampler = decoding.sampler
        self._stop_text = decoding.stop_text
        self._eos = decoding.eos_token_ids
        slots = min(decoding.rows_in_flight, len(questions))
        width = max(question.limit for question in questions)
        max_length = max(len(question.prompt) + question.limit for question in questions)
        self._rows = _Rows.empty(slots, width, self._sampler is not None, sorted(self._eos), model.device)
        if decoding.no_repeat_ngram is not None:
            self._rows.repeats = RepeatedNgrams.empty(decoding.no_repeat_ngram, slots, max_length, model.device)
        self._decoder = SlotDecoder(model, slots, max_length)
        self._graphs = StepGraphs() if decoding.graphs and model.device.type == "cuda" else None
        self._waiting = deque(range(len(questions)))
        self._occupants: list[_Occupant | None] = [None] * slots

    def run(
        self,
        on_answer: Callable[[int, list[int]], None],
        should_stop: ShouldStop = lambda: False,
        on_partial: Callable[[int, list[int]], None] | None = None,
    ) -> None:
        """Answer all questions, in the order given; `on_answer` is called with each one's index and new tokens.

        Args:
            on_partial: Called with the index and the tokens so far of each question that goes on, at each look.

        Raises:
            RunStopped: `should_stop`, polled before each prefill and each decode step, returned true.
        """
        while self._waiting or any(self._occupants):
            while self._waiting and None in self._occupants:
                _check(should_stop)
                self._prefill()
            in_flight = [occupant for occupant in self._occupants if occupant is not None]
            steps = min(LOOK_EVERY, max(occupant.most_left for occupant in in_flight))
            bucket = bucket_of(max(occupant.length + min(steps, occupant.most_left) for occupant in in_flight))
            with decode_attention(self._model):
                for _ in range(steps):
                    _check(should_stop)
                    if self._graphs is None:
                        self._decode(bucket)
                    else:
                        self._graphs.run(bucket, partial(self._decode, bucket))
            self._look(on_answer, on_partial)
            if not self._waiting:
                self._compact()

    def _prefill(self) -> None:
        """Read waiting prompts, as many as there are free slots and as fit, and choose the first token of each."""
        free = [slot for slot, occupant in enumerate(self._occupants) if occupant is None]
        budget = _PREFILL_TOKENS.get(self._model.device.type, 0)
        slots: list[int] = []
        read: list[Question] = []
        tokens = 0
        while self._waiting and len(slots) < len(free):
            question = self._questions[self._waiting[0]]
            tokens += len(question.prompt)
            if slots and tokens > budget:
                break
            slots.append(free[len(slots)])
            read.append(question)
            self._occupants[slots[-1]] = _Occupant(self._waiting.popleft(), len(question.prompt), question.limit)
        device = self._model.device
        lengths, limits = [len(question.prompt) for question in read], [question.limit for question in read]
        state = torch.tensor([slots, lengths, limits], device=device)
        logits = self._decoder.read([question.prompt for question in read], state[0])
        uniforms = None
        if self._sampler is not None:
            uniforms = self._sampler.uniforms([question.key for question in read], self._rows.width).to(device)
        if self._rows.repeats is not None:
            self._rows.repeats.begin(slots, [question.prompt for question in read])
        self._rows.begin(state, logits, self._sampler, uniforms)

    def _decode(self, bucket: int) -> None:
        """Give one more token to every slot."""
        rows = self._rows
        rows.append(self._decoder.step(rows.tokens, rows.lengths, bucket), self._sampler)

    def _look(
        self,
        on_answer: Callable[[int, list[int]], None],
        on_partial: Callable[[int, list[int]], None] | None,
    ) -> None:
        """Read on the host what has ended, and free its slots."""
        made = self._rows.made_or_ended().tolist()
        ended = []
        for slot, occupant in enumerate(self._occupants):
            if occupant is None:
                continue
            occupant.made = abs(made[slot])
            if made[slot] < 0:
                ended.append(slot)
        # Of the other rows only a text can say that they have ended.
        reads_all = self._stop_text is not None or on_partial is not None
        read = [slot for slot, each in enumerate(self._occupants) if each] if reads_all else ended
        if not read:
            return
        index = torch.tensor(read, device=self._model.device)
        stopped = []
        for slot, tokens in zip(read, self._rows.answers[index].tolist(), strict=True):
            occupant = self._occupants[slot]
            assert occupant is not None  # Only occupied slots were collected.
            answer = tokens[: occupant.made]
            answer = answer[:-1] if slot in ended and answer[-1] in self._eos else answer
            length = None if self._stop_text is None else self._stop_text.length_with(answer, occupant.looked_at)
            occupant.looked_at = len(answer)
            if length is None and slot not in ended:
                if on_partial is not None:
                    on_partial(occupant.question, answer)
                continue
            if slot not in ended:
                stopped.append(slot)
            on_answer(occupant.question, answer[:length])
            self._occupants[slot] = None
        if stopped:
            self._rows.end(torch.tensor(stopped, device=self._model.device))

    def _compact(self) -> None:
        """Halve the slots as often as the rows in flight still fit: shapes stay powers of two apart, so few."""
        taken = [slot for slot, occupant in enumerate(self._occupants) if occupant is not None]
        slots = len(self._occupants)
        while slots // 2 >= max(len(taken), 1):
            slots //= 2
        if not taken or slots == len(self._occupants):
            return
        free = [slot for slot, occupant in enumerate(self._occupants) if occupant is None]
        kept = [*taken, *free][:slots]
        index = torch.tensor(kept, device=self._model.device)
        self._occupants = [self._occupants[slot] for slot in kept]
        self._decoder.select(index)
        self._rows = self._rows.select(index)
        if self._graphs is not None:
            # The state lies at other addresses now.
            self._graphs = StepGraphs()


@dataclass
class _Occupant:
    """What the host knows about the row in a slot, as of its last look."""

    question: int
    prompt_length: int
    limit: int
    made: int = 1
    """Tokens of its answer."""
    looked_at: int = 0
    """Tokens of its answer that do not hold the text which would end it."""

    @property
    def length(self) -> int:
        """Tokens in its slot of the cache; the last of the answer is not in it yet."""
        return self.prompt_length + self.made - 1

    @property
    def most_left(self) -> int:
        """The most decode steps that it can still take."""
        return self.limit - self.made


@dataclass
class _Rows:
    """The state of all slots on the device, advanced there; an empty slot is one that has ended."""

    tokens: Tensor
    """`[slots]` int64: the last token of each, which the model has not read yet."""
    lengths: Tensor
    """`[slots]` int64: tokens in the cache, which is the position of `tokens`."""
    made: Tensor
    """`[slots]` int64: tokens of the answer, its end of sequence included."""
    limits: Tensor
    """`[slots]` int64: the most tokens of the answer."""
    ended: Tensor
    """`[slots]` bool."""
    answers: Tensor
    """`[slots, width + 1]` int64; what slots say after their end goes into the last column."""
    uniforms: Tensor
    """`[slots, width]` float64: the random numbers of each token; `[slots, 0]` where none are drawn."""
    eos: Tensor
    """`[ids]` int64: the tokens that end an answer."""
    repeats: RepeatedNgrams | None = None
    """What bans repeated n-grams; None where none are banned."""

    @classmethod
    def empty(cls, slots: int, width: int, has_sampler: bool, eos: Sequence[int], device: torch.device) -> "_Rows":
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            tokens=zeros(slots),
            lengths=zeros(slots),
            made=zeros(slots),
            limits=zeros(slots),
            ended=torch.ones(slots, dtype=torch.bool, device=device),
            answers=zeros(slots, width + 1),
            uniforms=zeros(slots, width if has_sampler else 0, dtype=torch.float64),
            eos=torch.tensor(eos, dtype=torch.long, device=device),
        )

    @property
    def width(self) -> int:
        """The most tokens of any answer."""
        return self.answers.shape[1] - 1

    def begin(self, state: Tensor, logits: Tensor, sampler: Sampler | None, uniforms: Tensor | None) -> None:
        """Put prompts that were read into slots, with the first token of each answer.

        Args:
            state: `[3, prompts]` int64: slot, length of the prompt, limit of the answer.
            logits: Of the first token, `[prompts, V]`.
            uniforms: The random numbers of each answer, `[prompts, width]` float64, where there is a sampler.
        """
        slots, lengths, limits = state
        if uniforms is not None:
            self.uniforms.index_copy_(0, slots, uniforms)
        if self.repeats is not None:
            logits = self.repeats.select(slots).banned(logits)
        chosen = logits.argmax(-1) if sampler is None or uniforms is None else sampler.choose(logits, uniforms[:, 0])
        if self.repeats is not None:
            # Of the other slots nothing is appended.
            begun = torch.zeros_like(self.ended).index_fill_(0, slots, True)
            self.repeats.append(self.tokens.index_copy(0, slots, chosen), begun)
        self.tokens.index_copy_(0, slots, chosen)
        self.lengths.index_copy_(0, slots, lengths)
        self.made.index_fill_(0, slots, 1)
        self.limits.index_copy_(0, slots, limits)
        self.answers[:, 0].index_copy_(0, slots, chosen)
        self.ended.index_copy_(0, slots, self._is_end(chosen) | (limits <= 1))

    def append(self, logits: Tensor, sampler: Sampler | None) -> None:
        """Choose a token for each slot, `[slots, V]`, and append it to the rows that have not ended."""
        if self.repeats is not None:
            logits = self.repeats.banned(logits)
        if sampler is None:
            chosen = logits.argmax(-1)
        else:
            draw = self.made.clamp(max=self.width - 1).unsqueeze(1)
            chosen = sampler.choose(logits, self.uniforms.gather(1, draw).squeeze(1))
        column = self.made.masked_fill(self.ended, self.width)
        self.answers.scatter_(1, column.unsqueeze(1), chosen.unsqueeze(1))
        self.tokens.copy_(chosen)
        going_on = self.ended.logical_not()
        self.lengths.add_(going_on)
        self.made.add_(going_on)
        if self.repeats is not None:
            self.repeats.append(chosen, going_on)
        self.ended.logical_or_(self._is_end(chosen)).logical_or_(self.made >= self.limits)

    def end(self, slots: Tensor) -> None:
        """Let these slots go on no more."""
        self.ended.index_fill_(0, slots, True)

    def made_or_ended(self) -> Tensor:
        """`[slots]` int64: tokens of each answer, negative where it has ended."""
        return torch.where(self.ended, -self.made, self.made)

    def select(self, slots: Tensor) -> "_Rows":
        """These slots alone, in this order."""
        state = {name: value[slots] for name, value in vars(self).items() if name not in ("eos", "repeats")}
        return _Rows(**state, eos=self.eos, repeats=None if self.repeats is None else self.repeats.select(slots))

    def _is_end(self, chosen: Tensor) -> Tensor:
        return (chosen.unsqueeze(1) == self.eos).any(1)


def _check(should_stop: ShouldStop) -> None:
    if should_stop():
        raise RunStopped
