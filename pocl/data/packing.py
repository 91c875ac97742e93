"""Where the samples of a packed batch are: what attention needs to know of them, made once per batch.

Kernels for sequences of variable length (varlen) take `cu_seqlens`. Where no such kernel can run, attention is computed
over padded rows, in a few groups of rows of similar length; the index tensors that pad and unpad are made here too.
The number of groups has a bound, so the number of operators does not grow with the samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pocl.data.transfer import Array, to_device

MAX_GROUPS = 4
"""Groups of rows at most. Of 1, 2, 3, 4 and 6 it is the fewest beyond which attention over Dolly's lengths gains
nothing."""
LENGTH_MULTIPLE = 32
"""Rows of a group are padded to multiples of this many tokens: the width that matrix units of CPUs work on."""
LengthT = TypeVar("LengthT", int, Array)
_QUERY_BLOCK = 192
"""Queries of a block, about: a block has no scores with keys after its last query."""


@dataclass(frozen=True)
class RowGroup:
    """Samples of similar length, as `rows` padded rows of `length` tokens."""

    rows: int
    length: int
    start: int
    """The rows of a batch's groups lie one behind the other: where the first of this group begins, in tokens."""

    @property
    def size(self) -> int:
        """Tokens of the group, padding included."""
        return self.rows * self.length

    @property
    def query_blocks(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of consecutive blocks of queries; their number depends on `length` alone."""
        units = self.length // LENGTH_MULTIPLE
        count = max(1, -(-self.length // _QUERY_BLOCK))
        edges = [units * block // count * LENGTH_MULTIPLE for block in range(count)]
        return tuple(zip(edges, [*edges[1:], self.length], strict=True))


@dataclass(frozen=True)
class HeadIndex:
    """The index tensors of a packing for states with `kv_heads` heads of keys and values, flattened to one head a row.

    A padded state is ordered by group, row, head and position.
    """

    padded_to_packed: Tensor
    """[padded tokens x kv_heads] int64: which row of the packed states `[tokens x kv_heads, ...]` is there."""
    packed_to_padded: Tensor
    """[tokens x kv_heads] int64: the inverse."""
    is_padding: Tensor
    """[padded tokens x kv_heads, 1] bool."""


@dataclass(frozen=True)
class Packing:
    """The places of n samples that are concatenated to L tokens, as tensors on the device of their batch."""

    lengths: tuple[int, ...]
    """Tokens of each sample. Padding to fixed shapes is a sample too, or several, some of no token."""
    cu_seqlens: Tensor
    """[n + 1] int32: where each sample begins, and L. The name is that of the varlen kernels' argument."""
    max_length: int
    """No sample has more tokens."""
    position_ids: Tensor
    """[1, L] int64: the position of each token in its sample, from 0."""
    groups: tuple[RowGroup, ...]
    """Each sample of at least one token is in one of them."""
    padded_to_packed: Tensor
    """[padded tokens] int64: which packed token is there; where padding is, the last token of its sample."""
    packed_to_padded: Tensor
    """[L] int64: where each packed token is among the padded ones."""
    is_padding: Tensor
    """[padded tokens] bool."""
    _head_indices: dict[int, HeadIndex] = field(default_factory=dict, repr=False, compare=False)
    _masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> "Packing":
        """The packing of samples of these lengths in tokens."""
        layout = PackingLayout.of(lengths)
        return layout.packing(to_device(layout.arrays, device))

    def head_index(self, kv_heads: int) -> HeadIndex:
        """The index tensors for this number of heads of keys and values, made at the first call."""
        if kv_heads not in self._head_indices:
            self._head_indices[kv_heads] = self._make_head_index(kv_heads)
        return self._head_indices[kv_heads]

    def causal_mask(self, block: tuple[int, int], heads: int, dtype: torch.dtype) -> Tensor:
        """0 where a query of the block sees a key and -inf where the key comes later, made at the first call.

        Returns:
            `[1, queries x heads, keys]`, ordered by query and head, with the keys from 0 to the end of the block.
        """
        start, stop = block
        key = (start, stop, heads)
        # One model runs on a batch in one format.
        if key not in self._masks:
            blank = torch.full((stop - start, stop), float("-inf"), dtype=dtype, device=self.cu_seqlens.device)
            self._masks[key] = blank.triu_(start + 1).repeat_interleave(heads, 0).unsqueeze(0)
        return self._masks[key]

    def _make_head_index(self, kv_heads: int) -> HeadIndex:
        places = torch.arange(len(self.padded_to_packed) * kv_heads, device=self.padded_to_packed.device)
        heads = places[:kv_heads]

        def head_major(of_group: Tensor, group: RowGroup) -> Tensor:
            """`[rows x length, kv_heads]` ordered as padded states are, `[rows x kv_heads x length]`."""
            return of_group.view(group.rows, group.length, kv_heads).transpose(1, 2).reshape(-1)

        packed = self.padded_to_packed[:, None] * kv_heads + heads
        padding = self.is_padding[:, None].expand(-1, kv_heads)
        places_by_token = [
            places[group.start * kv_heads : (group.start + group.size) * kv_heads]
            .view(group.rows, kv_heads, group.length)
            .transpose(1, 2)
            .reshape(group.size, kv_heads)
            for group in self.groups
        ]
        slices = [(slice(group.start, group.start + group.size), group) for group in self.groups]
        return HeadIndex(
            padded_to_packed=torch.cat([head_major(packed[part], group) for part, group in slices]),
            packed_to_padded=torch.cat(places_by_token).index_select(0, self.packed_to_padded).reshape(-1),
            is_padding=torch.cat([head_major(padding[part], group) for part, group in slices]).unsqueeze(1),
        )


@dataclass(frozen=True)
class PackingLayout:
    """A packing as arrays of the host, which enter the one copy to the device that a batch makes."""

    lengths: tuple[int, ...]
    max_length: int
    groups: tuple[RowGroup, ...]
    arrays: dict[str, Array]

    @classmethod
    def of(cls, lengths: Sequence[int], max_length: int | None = None) -> "PackingLayout":
        """The layout of samples of these lengths in tokens; `max_length` where a fixed bound is to be kept."""
        sizes = np.asarray(lengths, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        order = np.argsort(sizes, kind="stable")
        order = order[np.searchsorted(sizes[order], 1) :]
        groups: list[RowGroup] = []
        padded_to_packed: list[Array] = []
        is_padding: list[Array] = []
        packed_to_padded = np.empty(starts[-1], dtype=np.int64)
        place = 0
        for first, stop in group_by_length(sizes[order]):
            samples = order[first:stop]
            group = RowGroup(rows=len(samples), length=_padded(int(sizes[samples[-1]])), start=place)
            position = np.arange(group.length)
            valid = position < sizes[samples, None]
            tokens = starts[samples, None] + np.minimum(position, sizes[samples, None] - 1)
            packed_to_padded[tokens[valid]] = place + np.flatnonzero(valid)
            padded_to_packed.append(tokens.reshape(-1))
            is_padding.append(~valid.reshape(-1))
            groups.append(group)
            place += group.size
        return cls(
            lengths=tuple(map(int, sizes)),
            max_length=int(sizes.max()) if max_length is None else max_length,
            groups=tuple(groups),
            arrays={
                "cu_seqlens": starts.astype(np.int32),
                "position_ids": (np.arange(starts[-1]) - np.repeat(starts[:-1], sizes))[None],
                "padded_to_packed": np.concatenate(padded_to_packed),
                "packed_to_padded": packed_to_padded,
                "is_padding": np.concatenate(is_padding),
            },
        )

    def packing(self, tensors: dict[str, Tensor]) -> Packing:
        """The packing of these lengths; `tensors` has, beside others, those of `arrays`."""
        return Packing(
            lengths=self.lengths,
            max_length=self.max_length,
            groups=self.groups,
            cu_seqlens=tensors["cu_seqlens"],
            position_ids=tensors["position_ids"],
            padded_to_packed=tensors["padded_to_packed"],
            packed_to_padded=tensors["packed_to_padded"],
            is_padding=tensors["is_padding"],
        )


def group_by_length(lengths: Array) -> list[tuple[int, int]]:
    """[start, stop) of at most `MAX_GROUPS` groups of ascending `lengths`, for which attention over padded rows is
    cheapest: the fewest scores, rows x length squared.
    """
    padded, firsts = np.unique(_padded(lengths), return_index=True)
    count = len(padded)
    # Where the rows of each distinct length begin, and how many there are in all.
    edges = np.append(firsts, len(lengths))
    rows = edges[1:][None] - edges[:-1][:, None]
    # The cost of a group of the lengths from i up to j, where it is not empty.
    cost = np.where(rows > 0, rows * padded.astype(np.float64) ** 2, np.inf)
    best = [np.concatenate([[0.0], np.full(count, np.inf)])]
    cuts: list[Array] = []
    for _ in range(min(MAX_GROUPS, count)):
        totals = best[-1][:-1, None] + cost
        cuts.append(totals.argmin(axis=0))
        best.append(np.concatenate([[np.inf], totals.min(axis=0)]))
    # The fewest groups of those that cost least.
    used = min(range(1, len(best)), key=lambda groups: best[groups][-1])
    groups: list[tuple[int, int]] = []
    stop = count
    for cut in reversed(cuts[:used]):
        start = int(cut[stop - 1])
        groups.append((int(edges[start]), int(edges[stop])))
        stop = start
    return groups[::-1]


def _padded(length: LengthT) -> LengthT:
    """The length or lengths rounded up to multiples of `LENGTH_MULTIPLE`."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
