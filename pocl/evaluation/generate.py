"""Batched generation of answers to many prompts, greedy or sampled, with a key-value cache."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pocl.errors import RunStopped
from pocl.evaluation.sampling import Sampler
from pocl.models.growing_cache import growing_cache
from pocl.models.heads import restrict_head
from pocl.models.positions import position_arguments

_MAX_ACTIVE_SHARE = 0.75
"""Finished rows leave their batch once at most this share of it is active: leaving copies the cache."""


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    eos_token_ids: Set[int],
    pad_id: int,
    sampler: Sampler | None = None,
    keys: Sequence[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[list[int]]:
    """Generate an answer to each prompt, token by token, until an end-of-sequence token or the limit.

    An answer does not depend on the other prompts or on `batch_size`, but for rounding: prompts of like length share
    a batch, and rows leave their batch when enough of them are finished.

    Args:
        model: Any causal language model; it runs in eval mode, and its mode is restored.
        prompts: Token ids, at least one each. They may contain `pad_id` and end-of-sequence tokens.
        max_new_tokens: The most tokens of an answer. An answer also ends where the model has no more positions.
        batch_size: The number of prompts that are answered at once.
        eos_token_ids: The tokens that end an answer and are not part of it; may be empty.
        pad_id: Any id of the vocabulary; it fills masked positions.
        sampler: Draws each token; without it the most likely token is taken.
        keys: One key for each prompt, from which its random draws follow together with the seed of the sampler;
            its index in `prompts` unless given.
        on_progress: Called with (prompts answered, prompts) after each batch.
        should_stop: Polled before each batch and each token.

    Returns:
        The new token ids of each answer, in the order of `prompts`.

    Raises:
        RunStopped: `should_stop` returned true.
        ValueError: a prompt is empty or leaves no position for an answer, a number is below 1, or there are
            more or fewer keys than prompts.
    """
    _check(model, prompts, max_new_tokens, batch_size)
    keys = [str(index) for index in range(len(prompts))] if keys is None else keys
    if len(keys) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts have {len(keys)} keys")
    answers: list[list[int]] = [[] for _ in prompts]
    # The longest prompts come first: a batch that does not fit into memory fails at once and not after an hour.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    was_training = model.training
    model.train(False)
    try:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = _Batch.start(model, [prompts[index] for index in indices], max_new_tokens, pad_id)
            if sampler is not None:
                batch.use_sampler(sampler, [keys[index] for index in indices])
            for index, answer in zip(indices, _decode(model, batch, eos_token_ids, should_stop), strict=True):
                answers[index] = answer
            if on_progress is not None:
                on_progress(start + len(indices), len(order))
    finally:
        model.train(was_training)
    return answers


def model_stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The end-of-sequence tokens of the generation config and of the tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(id_) for id_ in (*ids, tokenizer.eos_token_id) if id_ is not None)


def _check(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError("max_new_tokens and batch_size must be at least 1")
    positions = _positions(model)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty")
        if positions is not None and len(prompt) >= positions:
            raise ValueError(f"prompt {index} has {len(prompt)} tokens; the model has {positions} positions")


def _positions(model: PreTrainedModel) -> int | None:
    positions = getattr(model.config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


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
    cache: DynamicCache
    finished: set[int] = field(default_factory=set)
    """The slots whose answer has ended."""
    sampler: Sampler | None = None
    uniforms: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """The random numbers of a sampler, `[B, longest answer]`; empty without one."""

    @classmethod
    def start(
        cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad_id: int
    ) -> "_Batch":
        """Pad prompts on the left, so that all answers begin in the same column."""
        width = max(map(len, prompts))
        positions = _positions(model)
        remaining = [max_new_tokens if positions is None else positions - len(prompt) for prompt in prompts]
        limits = [min(max_new_tokens, positions_left) for positions_left in remaining]
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

    def choose(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """The next token of each row, `[B, V]` -> `[B]`; `step` is the number of tokens before it."""
        if self.sampler is None:
            return logits.argmax(dim=-1)
        return self.sampler.choose(logits, self.uniforms[:, step])

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


def _decode(
    model: PreTrainedModel, batch: _Batch, eos_token_ids: Set[int], should_stop: Callable[[], bool] | None
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in batch.slots]
    # The head is applied to the last column alone, also while the prompts are read (prefill).
    with restrict_head(model, lambda hidden: hidden[:, -1:]):
        for step in range(max(batch.limits)):
            if should_stop is not None and should_stop():
                raise RunStopped()
            tokens = batch.choose(_next_logits(model, batch), step)
            for slot, token in zip(batch.slots, tokens.tolist(), strict=True):
                if slot in batch.finished:
                    continue
                if token not in eos_token_ids:
                    answers[slot].append(token)
                if token in eos_token_ids or len(answers[slot]) == batch.limits[slot]:
                    batch.finished.add(slot)
            if len(batch.finished) == len(answers):
                break
            batch.append(tokens)
    return answers


def _next_logits(model: PreTrainedModel, batch: _Batch) -> torch.Tensor:
    """The logits of the next token of each row, `[B, V]`."""
    mask = batch.mask[:, : batch.width]
    positions = position_arguments(model, mask)
    unread = batch.input_ids.shape[1]
    output = model(
        input_ids=batch.input_ids,
        attention_mask=mask,
        past_key_values=batch.cache,
        use_cache=True,
        **{name: value[:, -unread:] for name, value in positions.items()},
    )
    logits: torch.Tensor = output.logits[:, -1]
    return logits
