"""A key-value cache for decoding, in buffers that grow geometrically.

The dynamic cache of transformers concatenates at each token, which copies all that it holds: quadratic in the length of
the answer. Here a token is written into spare capacity, and the numbers that the model sees are the same.
"""

from typing import cast

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

_SPARE_TOKENS = 64
"""Capacity beyond the need when a buffer grows, at least."""


class GrowingLayer(DynamicLayer):
    """The keys and values of a layer, `[B, heads, tokens, width]`: views of larger buffers."""

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens`: tokens that a sequence will ever have, and the largest capacity of a buffer."""
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated.
        self._max_tokens = max_tokens
        self._buffers: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, heads, new tokens, width]`, and return the views over all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences alone, with their spare capacity: one copy now and none at the next token."""
        tokens = self.get_seq_length()
        self._buffers = {name: buffer[indices] for name, buffer in self._buffers.items()}
        for name, buffer in self._buffers.items():
            setattr(self, name, buffer[..., :tokens, :])

    def _append(self, name: str, current: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        tokens = 0 if current is None or not current.numel() else current.shape[-2]
        needed = tokens + new.shape[-2]
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[-2] < needed:
            capacity = max(needed, min(needed + max(needed // 2, _SPARE_TOKENS), self._max_tokens))
            buffer = new.new_empty((*new.shape[:-2], capacity, new.shape[-1]))
            if current is not None and tokens:
                buffer[..., :tokens, :] = current
            self._buffers[name] = buffer
        buffer[..., tokens:needed, :] = new
        return buffer[..., :needed, :]


class GrowingCache(DynamicCache):
    """The dynamic cache of a model, from which sequences can be dropped whatever its layers hold."""

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences alone, in this order."""
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                # transformers selects the keys and values of such a layer alone, or nothing.
                layer.reorder_cache(cast(torch.LongTensor, indices))
            elif isinstance(layer, DynamicLayer):
                layer.batch_select_indices(indices)


def growing_cache(config: PreTrainedConfig, max_tokens: int) -> GrowingCache:
    """The dynamic cache of a model, whose full-attention layers grow in place; its other layers stay as they are.

    It supports appending and selecting sequences, but not cropping, reordering and repeating.
    """
    cache = GrowingCache(config=config)
    # Subclasses of the dynamic layer have sliding windows or recurrent states, and are left alone.
    cache.layers = [GrowingLayer(max_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
