"""Answers to many prompts, greedy or sampled."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pocl.errors import RunStopped
from pocl.evaluation.sampling import Sampler
from pocl.models.growing_cache import growing_cache
from pocl.models.heads import restrict_head
from pocl.models.positions import position_arguments

_KEPT_SHARE = 0.75
"""Rows that ended leave their batch once no more than this share of it goes on: leaving copies the cache."""


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
    """The next token, again and again, until an end-of-sequence token or the limit.

    A prompt's answer does not depend on the other prompts or on `batch_size`, but for rounding: prompts
    of like length share a batch, and rows leave their batch when enough of them have ended.

    Args:
        model: Any causal language model; run in eval mode and left in the mode it came in.
        prompts: Token ids, at least one each. They may contain `pad_id` and end-of-sequence tokens.
        max_new_tokens: Limit for each answer. An answer also ends where the model has no more positions.
        batch_size: Prompts at once.
        eos_token_ids: Tokens that end an answer. They are not part of it. May be empty.
        pad_id: Any id of the vocabulary; it fills places that are masked.
        sampler: Draws each token; without it the most likely token is taken.
        keys: What a prompt's draws follow from, besides the sampler's seed: one for each prompt. Its place in
            `prompts` unless given.
        on_progress: Called with (prompts answered, prompts) after each batch.
        should_stop: Asked before each batch and each token.

    Returns:
        One list of new token ids for each prompt, in the order of `prompts`.

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
    # Longest first: a batch that does not fit into memory fails at once and not after an hour.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    was_training = model.training
    model.train(False)
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = _Batch.of(model, [prompts[index] for index in chosen], max_new_tokens, pad_id)
            if sampler is not None:
                batch.draw_by(sampler, [keys[index] for index in chosen])
            for index, answer in zip(chosen, _decode(model, batch, eos_token_ids, should_stop), strict=True):
                answers[index] = answer
            if on_progress is not None:
                on_progress(start + len(chosen), len(order))
    finally:
        model.train(was_training)
    return answers


def model_stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends an answer: those of the generation config, and the tokenizer's own."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = configured if isinstance(configured, list) else [configured]
    return frozenset(int(id_) for id_ in (*found, tokenizer.eos_token_id) if id_ is not None)


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
    """Rows that are being answered, B of them, some of which may have ended. Tensors lose ended rows together."""

    places: list[int]
    """For each row of the tensors, its place in the batch as it began."""
    limits: list[int]
    """For each place, the longest answer."""
    input_ids: torch.Tensor
    """What the model has not seen yet: the prompts, then one token a row. `[B, L]` or `[B, 1]`."""
    mask: torch.Tensor
    """`[B, L + longest answer]`: 1 at the tokens of rows that went on, 0 at padding, after an end and ahead."""
    seen: int
    """Columns of `mask` up to now."""
    cache: DynamicCache
    ended: set[int] = field(default_factory=set)
    """Places."""
    sampler: Sampler | None = None
    uniforms: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    """`[B, longest answer]` where a sampler draws."""

    @classmethod
    def of(cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad_id: int) -> "_Batch":
        """Prompts padded on their left, so that all answers begin in the same column."""
        width = max(map(len, prompts))
        positions = _positions(model)
        room = [max_new_tokens if positions is None else positions - len(prompt) for prompt in prompts]
        limits = [min(max_new_tokens, positions_left) for positions_left in room]
        padded = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        mask = torch.zeros(len(prompts), width + max(limits), dtype=torch.long, device=model.device)
        mask[:, :width] = torch.tensor(real, device=model.device)
        return cls(
            places=list(range(len(prompts))),
            limits=limits,
            input_ids=torch.tensor(padded, device=model.device),
            mask=mask,
            seen=width,
            cache=growing_cache(model.config, mask.shape[1]),
        )

    def draw_by(self, sampler: Sampler, keys: Sequence[str]) -> None:
        """Let `sampler` draw the tokens; one key a row."""
        self.sampler = sampler
        self.uniforms = sampler.uniforms(keys, max(self.limits)).to(self.input_ids.device)

    def choose(self, logits: torch.Tensor, token: int) -> torch.Tensor:
        """The next token of each row, `[B, V]` -> `[B]`; `token` counts those before it."""
        if self.sampler is None:
            return logits.argmax(dim=-1)
        return self.sampler.choose(logits, self.uniforms[:, token])

    def append(self, tokens: torch.Tensor) -> None:
        """Go on with these tokens, one a row, and without the rows that ended where that pays."""
        going_on = [place not in self.ended for place in self.places]
        self.input_ids = tokens.unsqueeze(1)
        # The mask stands still for an ended row, and so does its position: no row outruns the model's positions.
        self.mask[:, self.seen] = torch.tensor(going_on, device=self.mask.device)
        self.seen += 1
        if sum(going_on) <= _KEPT_SHARE * len(going_on):
            self._select([row for row, goes_on in enumerate(going_on) if goes_on])

    def _select(self, rows: list[int]) -> None:
        kept = torch.tensor(rows, dtype=torch.long, device=self.input_ids.device)
        self.places = [self.places[row] for row in rows]
        self.input_ids = self.input_ids[kept]
        self.mask = self.mask[kept]
        self.cache.batch_select_indices(kept)
        if self.sampler is not None:
            self.uniforms = self.uniforms[kept]


def _decode(
    model: PreTrainedModel, batch: _Batch, eos_token_ids: Set[int], should_stop: Callable[[], bool] | None
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in batch.places]
    # The head is applied to the last column alone, also of the prompts.
    with restrict_head(model, lambda hidden: hidden[:, -1:]):
        for step in range(max(batch.limits)):
            if should_stop is not None and should_stop():
                raise RunStopped()
            tokens = batch.choose(_next_logits(model, batch), step)
            for place, token in zip(batch.places, tokens.tolist(), strict=True):
                if place in batch.ended:
                    continue
                if token not in eos_token_ids:
                    answers[place].append(token)
                if token in eos_token_ids or len(answers[place]) == batch.limits[place]:
                    batch.ended.add(place)
            if len(batch.ended) == len(answers):
                break
            batch.append(tokens)
    return answers


def _next_logits(model: PreTrainedModel, batch: _Batch) -> torch.Tensor:
    """`[B, V]`."""
    mask = batch.mask[:, : batch.seen]
    positions = position_arguments(model, mask)
    unseen = batch.input_ids.shape[1]
    output = model(
        input_ids=batch.input_ids,
        attention_mask=mask,
        past_key_values=batch.cache,
        use_cache=True,
        **{name: value[:, -unseen:] for name, value in positions.items()},
    )
    logits: torch.Tensor = output.logits[:, -1]
    return logits
