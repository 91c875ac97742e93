"""Greedy answers to many prompts."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pocl.errors import RunStopped
from pocl.models.heads import restrict_head
from pocl.models.positions import position_arguments


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    eos_token_ids: Set[int],
    pad_id: int,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[list[int]]:
    """The most likely next token, again and again, until an end-of-sequence token or the limit.

    A prompt's answer does not depend on the other prompts or on `batch_size`, but for rounding: prompts
    of like length share a batch, and a row leaves its batch as soon as it ends.

    Args:
        model: Any causal language model; run in eval mode and left in the mode it came in.
        prompts: Token ids, at least one each. They may contain `pad_id` and end-of-sequence tokens.
        max_new_tokens: Limit for each answer. An answer also ends where the model has no more positions.
        batch_size: Prompts at once.
        eos_token_ids: Tokens that end an answer. They are not part of it. May be empty.
        pad_id: Any id of the vocabulary; it fills places that are masked.
        on_progress: Called with (prompts answered, prompts) after each batch.
        should_stop: Asked before each batch and each token.

    Returns:
        One list of new token ids for each prompt, in the order of `prompts`.

    Raises:
        RunStopped: `should_stop` returned true.
        ValueError: a prompt is empty or leaves no position for an answer, or a number is below 1.
    """
    _check(model, prompts, max_new_tokens, batch_size)
    answers: list[list[int]] = [[] for _ in prompts]
    # Longest first: a batch that does not fit into memory fails at once and not after an hour.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    was_training = model.training
    model.train(False)
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = _Batch.of(model, [prompts[index] for index in chosen], max_new_tokens, pad_id)
            for index, answer in zip(chosen, _decode(model, batch, eos_token_ids, should_stop), strict=True):
                answers[index] = answer
            if on_progress is not None:
                on_progress(start + len(chosen), len(order))
    finally:
        model.train(was_training)
    return answers


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
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
    """Rows that are still being answered. Tensors shrink as rows end and grow by one column a token."""

    rows: list[int]
    """For each row of the tensors, its place in the batch."""
    input_ids: torch.Tensor
    """What the model has not seen yet: the prompts, then one token a row. `[B, L]` or `[B, 1]`."""
    attention_mask: torch.Tensor
    """`[B, tokens so far]`."""
    cache: DynamicCache
    limits: list[int]
    """For each place in the batch, the longest answer."""

    @classmethod
    def of(cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, pad_id: int) -> "_Batch":
        """Prompts padded on their left, so that all answers begin in the same column."""
        width = max(map(len, prompts))
        padded = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        positions = _positions(model)
        room = [max_new_tokens if positions is None else positions - len(prompt) for prompt in prompts]
        return cls(
            rows=list(range(len(prompts))),
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            cache=DynamicCache(config=model.config),
            limits=[min(max_new_tokens, positions_left) for positions_left in room],
        )

    def keep(self, places: list[int]) -> None:
        """Drop every row whose place in the batch is not among `places`."""
        if places == self.rows:
            # Selecting all rows would copy the whole cache.
            return
        rows = [row for row, place in enumerate(self.rows) if place in places]
        kept = torch.tensor(rows, dtype=torch.long, device=self.input_ids.device)
        self.rows = places
        self.input_ids = self.input_ids[kept]
        self.attention_mask = self.attention_mask[kept]
        self.cache.batch_select_indices(kept)

    def append(self, tokens: torch.Tensor) -> None:
        self.input_ids = tokens.unsqueeze(1)
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(self.input_ids)], dim=1)


def _decode(
    model: PreTrainedModel, batch: _Batch, eos_token_ids: Set[int], should_stop: Callable[[], bool] | None
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in batch.rows]
    # The head is applied to the last column alone, also of the prompts.
    with restrict_head(model, lambda hidden: hidden[:, -1:]):
        while batch.rows:
            if should_stop is not None and should_stop():
                raise RunStopped()
            tokens = _next_tokens(model, batch)
            unfinished = []
            for place, token in zip(batch.rows, tokens.tolist(), strict=True):
                if token in eos_token_ids:
                    continue
                answers[place].append(token)
                if len(answers[place]) < batch.limits[place]:
                    unfinished.append(place)
            batch.append(tokens)
            batch.keep(unfinished)
    return answers


def _next_tokens(model: PreTrainedModel, batch: _Batch) -> torch.Tensor:
    positions = position_arguments(model, batch.attention_mask)
    unseen = batch.input_ids.shape[1]
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        past_key_values=batch.cache,
        use_cache=True,
        **{name: value[:, -unseen:] for name, value in positions.items()},
    )
    tokens: torch.Tensor = output.logits[:, -1].argmax(dim=-1)
    return tokens
