"""Keys and values of a decoding loop in room that grows geometrically.

The dynamic cache of transformers concatenates at each token, which copies all that it holds: the square of the
answer's length. Here a token is written into spare room, and the numbers that the model sees are the same.
"""

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

_SPARE = 64
"""Columns of room beyond the need, at least."""


class GrowingLayer(DynamicLayer):
    """`keys` and `values`, `[B, heads, tokens, width]`, are views of larger buffers."""

    def __init__(self, longest: int) -> None:
        """`longest`: tokens a row will ever have; no more room is made than that needs."""
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated.
        self._longest = longest
        self._rooms: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, heads, new tokens, width]`; the views over all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows alone, with their spare room: one copy now and none at the next token."""
        tokens = self.get_seq_length()
        self._rooms = {name: room[indices] for name, room in self._rooms.items()}
        for name, room in self._rooms.items():
            setattr(self, name, room[..., :tokens, :])

    def _appended(self, name: str, held: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        tokens = 0 if held is None or not held.numel() else held.shape[-2]
        needed = tokens + new.shape[-2]
        room = self._rooms.get(name)
        if room is None or room.shape[-2] < needed:
            columns = max(needed, min(needed + max(needed // 2, _SPARE), self._longest))
            room = new.new_empty((*new.shape[:-2], columns, new.shape[-1]))
            if held is not None and tokens:
                room[..., :tokens, :] = held
            self._rooms[name] = room
        room[..., tokens:needed, :] = new
        return room[..., :needed, :]


def growing_cache(config: PreTrainedConfig, longest: int) -> DynamicCache:
    """The dynamic cache of a model whose full-attention layers grow in place; its other layers stay as they are.

    It may be appended to and have rows selected; cropping, reordering and repeating are not for it.
    """
    cache = DynamicCache(config=config)
    # Subclasses keep windows or states of their own and are left alone.
    cache.layers = [GrowingLayer(longest) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
