"""A static key-value cache for continuous batching, and the attention that decodes from it.

Each row in flight has a *slot*: its own stretch of one buffer per layer, `[slots, heads, capacity, width]`, which is
allocated once. A prompt's keys and values are scattered into its slot when it is read (prefill); each decode step then
writes one token a slot and attends over the first `bucket` positions, a multiple of :data:`BUCKET`. Shapes therefore
repeat, and neither the number of operators nor an address depends on how many rows there are or how long they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

NAME = "pocl_decode"
BUCKET = 64
"""Key lengths of a decode step are multiples of it. It divides the blocks of the attention kernels, so that masked
positions at the end of a bucket change no bit of the result on a CPU."""
_DECODING_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels for decoding on CUDA: they take a mask, and unlike cuDNN's they plan nothing for each new shape."""


class SlotCache(Cache):
    """Keys and values of all layers, written at the positions that the step before has set."""

    def __init__(self, layers: int, slots: int, capacity: int) -> None:
        """`capacity`: tokens that a slot can hold."""
        self._slot_layers = [_SlotLayer(self) for _ in range(layers)]
        super().__init__(layers=[*self._slot_layers])
        self.slots = slots
        self.capacity = capacity
        self.bucket = 0
        """Positions that a decode step attends over; 0 while prompts are read."""
        self._slot_of_token = torch.empty(0, dtype=torch.long)
        self._position_of_token = torch.empty(0, dtype=torch.long)
        self._rows_by_heads: dict[int, Tensor] = {}

    def write_prompts(self, slot_of_token: Tensor, position_of_token: Tensor) -> None:
        """The next forward reads packed prompts: token t, `[tokens]` int64 each, goes to its slot and position."""
        self._set(slot_of_token, position_of_token, bucket=0)

    def write_next(self, positions: Tensor, bucket: int) -> None:
        """The next forward reads one token a slot, `positions` `[slots]` int64, and attends over `bucket` positions."""
        self._set(torch.arange(self.slots, device=positions.device), positions, bucket)

    def select(self, slots: Tensor) -> None:
        """Keep these slots alone, in this order: one copy of what they hold."""
        self.slots = len(slots)
        for layer in self._slot_layers:
            layer.select(slots)

    def rows(self, heads: int) -> Tensor:
        """Where the tokens of the next forward go, as rows of a buffer `[slots x heads x capacity, width]`:
        `[tokens x heads]` int64, token by token.
        """
        if heads not in self._rows_by_heads:
            head = torch.arange(heads, device=self._slot_of_token.device)
            stretch = self._slot_of_token.unsqueeze(1) * heads + head
            self._rows_by_heads[heads] = (stretch * self.capacity + self._position_of_token.unsqueeze(1)).flatten()
        return self._rows_by_heads[heads]

    def _set(self, slot_of_token: Tensor, position_of_token: Tensor, bucket: int) -> None:
        self.bucket = bucket
        self._slot_of_token = slot_of_token
        self._position_of_token = position_of_token
        self._rows_by_heads = {}


class _SlotLayer(CacheLayerMixin):
    """The buffers of one layer."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated.
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, since a masked position is multiplied by zero, which makes no zero of a NaN.
        self.keys, self.values = (
            states.new_zeros(self._cache.slots, states.shape[1], self._cache.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write `[rows, heads, tokens, width]`; what to attend over: these themselves in a prefill, else the bucket."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            rows = states.transpose(1, 2).reshape(-1, states.shape[3])
            buffer.view(-1, buffer.shape[3]).index_copy_(0, self._cache.rows(states.shape[1]), rows)
        bucket = self._cache.bucket
        return (self.keys[:, :, :bucket], self.values[:, :, :bucket]) if bucket else (key_states, value_states)

    def select(self, slots: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[slots], self.values[slots]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.bucket or query_length, 0

    def get_seq_length(self) -> int:
        # The slots differ in length; positions are given to the model, which need not ask.
        return 0

    def get_max_length(self) -> int:
        return self._cache.capacity


def bucket_of(tokens: int) -> int:
    """The least bucket that holds so many tokens."""
    return -(-tokens // BUCKET) * BUCKET


def decode_mask(positions: Tensor, bucket: int, dtype: torch.dtype) -> Tensor:
    """What a decode step adds to attention scores, `[slots, 1, 1, bucket]`: 0 up to each slot's position, else -inf."""
    ahead = torch.arange(bucket, device=positions.device) > positions.unsqueeze(1)
    mask = torch.zeros(ahead.shape, dtype=dtype, device=positions.device).masked_fill_(ahead, -torch.inf)
    return mask[:, None, None]


@contextmanager
def decode_attention(model: PreTrainedModel) -> Iterator[None]:
    """While the context lasts, `model` reads one token a slot, with a :func:`decode_mask` as attention mask."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        with sdpa_kernel(_DECODING_BACKENDS) if model.device.type == "cuda" else nullcontext():
            yield
    finally:
        config._attn_implementation = before


def _attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Attention of one query a slot.

    Args:
        query: `[slots, heads, 1, width]`.
        key, value: `[slots, key heads, bucket, width]`; several heads of the query may share one of theirs.
        mask: Added to the scores, `[slots, 1, 1, bucket]`.
        dropout: Not used: nothing is decoded in train mode.

    Returns:
        `[slots, 1, heads, width]`, and None for the attention weights.

    Raises:
        ValueError: the model caps attention scores, which none of the kernels here can, or hands on no mask.
    """
    del dropout
    if options.get("softcap") is not None or mask is None:
        raise ValueError("attention scores are capped, or the mask was lost")
    slots, heads, _, width = query.shape
    # The heads that share keys become queries of one head: nothing is repeated, with any kernel.
    grouped = query.reshape(slots, key.shape[1], heads // key.shape[1], width)
    attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(slots, 1, heads, value.shape[3]), None


AttentionInterface.register(NAME, _attention)
