"""Causal attention of packed samples by batched products over padded rows: the reference of the varlen kernels.

It runs where no such kernel can: on a CPU, in fp32, and with dropout. Rows are padded in the few groups of
:class:`~pocl.data.packing.Packing`, so the number of operators does not grow with the samples. Padding and unpadding
are gathers, forward and backward, so nothing is summed in an order that is not fixed.

On a CPU and for rows that are not long the products are written out, with the backward by hand. In bf16 that takes less
than half of the time of the CPU's flash attention, whose backward is slow on short rows. Long rows and other devices
take the scaled dot product attention (SDPA) of torch, which never has all scores in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pocl.data.packing import HeadIndex, Packing, RowGroup

LONGEST_EXPLICIT = 512
"""Tokens of a row up to which a layer keeps the probabilities of its backward: at most as many bytes a token as the
layer keeps for its other products. Beyond them SDPA is as fast."""


def batched_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, *, scale: float, dropout: float
) -> Tensor:
    """Causal attention within each sample.

    Args:
        query: `[tokens, heads, width]`.
        key, value: `[tokens, kv_heads, width]`, of the dtype of `query`; `heads` is a multiple of `kv_heads`.
        packing: Where the samples are.
        scale: Factor of the scores.
        dropout: Share of the probabilities that are set to 0; the others grow by 1 / (1 - dropout).

    Returns:
        `[tokens, heads, width of value]`.
    """
    if query.device.type == "cpu" and packing.max_length <= LONGEST_EXPLICIT:
        # The method is typed as returning anything.
        return cast(Tensor, _ExplicitAttention.apply(query, key, value, packing, scale, dropout))  # type: ignore[no-untyped-call] # torch does not type it.
    return _sdpa(query, key, value, packing, scale, dropout)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, dropout: float) -> Tensor:
    shares_heads = query.shape[1] != key.shape[1]
    if shares_heads and query.device.type != "cpu":
        # Of the kernels of SDPA for CUDA only the one for half precision can share heads.
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        shares_heads = False
    padded = [_Pad.apply(states, packing) for states in (query, key, value)]  # type: ignore[no-untyped-call] # torch does not type it.
    attended: list[Tensor] = []
    for group in packing.groups:
        q, k, v = (_rows(states, group) for states in padded)
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=shares_heads
        )
        attended.append(out.transpose(1, 2).flatten(0, 1))
    return cast(Tensor, _Unpad.apply(torch.cat(attended), packing))  # type: ignore[no-untyped-call] # torch does not type it.


def _rows(padded: Tensor, group: RowGroup) -> Tensor:
    """`[padded tokens, heads, width]` -> `[rows, heads, length, width]`."""
    part = padded[group.start : group.start + group.size]
    return part.view(group.rows, group.length, *padded.shape[1:]).transpose(1, 2)


class _Pad(torch.autograd.Function):
    """`[tokens, ...]` -> `[padded tokens, ...]`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return states.index_select(0, packing.padded_to_packed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Padding has no gradient: no query of a sample sees it, and its own output is dropped.
        return gradient.index_select(0, ctx.packing.packed_to_padded), None


class _Unpad(torch.autograd.Function):
    """`[padded tokens, ...]` -> `[tokens, ...]`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return states.index_select(0, packing.packed_to_padded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        packing: Packing = ctx.packing
        padded = gradient.index_select(0, packing.padded_to_packed)
        return padded.masked_fill_(packing.is_padding.view(-1, *[1] * (gradient.dim() - 1)), 0), None


class _ExplicitAttention(torch.autograd.Function):
    """Attention by batched products, which keeps the probabilities for its backward.

    A sample's queries are ordered by position and by the heads that share a head of keys, so that these heads are rows
    of one product, and keys and values need not be repeated. With S = scale Q K^T, P = softmax(S), M the dropout's
    factors and O = (P M) V:

        dV = (P M)^T dO,   dP = (dO V^T) M,   dS = P (dP - rowsum(P dP)),   dQ = scale dS K,   dK = scale dS^T Q
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, dropout: float
    ) -> Tensor:
        kv_heads = key.shape[1]
        index = packing.head_index(kv_heads)
        q, k, v = (_pad_heads(states, index, kv_heads) for states in (query, key, value))
        out = v.new_empty(len(q), query.shape[1] // kv_heads * v.shape[1])
        kept: list[Tensor] = []
        for group in packing.groups:
            group_q, group_k, group_v, group_out = _of_group(group, kv_heads, v.shape[1], q, k, v, out)
            for block in group.query_blocks:
                rows, keys = _block(block, group_q, group)
                probabilities = _probabilities(group_q[:, rows], group_k[:, keys], packing, block, scale)
                kept.append(probabilities)
                if dropout:
                    factors = torch.empty_like(probabilities).bernoulli_(1 - dropout).div_(1 - dropout)
                    kept.append(factors)
                    probabilities = probabilities * factors
                group_out[:, rows] = torch.bmm(probabilities, group_v[:, keys])
        ctx.save_for_backward(q, k, v, *kept)
        ctx.packing, ctx.kv_heads, ctx.scale, ctx.dropout = packing, kv_heads, scale, dropout
        return out.index_select(0, index.packed_to_padded).view(*query.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packing: Packing = ctx.packing
        kv_heads: int = ctx.kv_heads
        q, k, v, *kept = ctx.saved_tensors
        index = packing.head_index(kv_heads)
        # No gradient enters a query that is padding, else it would reach the keys that it sees.
        d_out = _pad_heads(gradient, index, kv_heads).masked_fill_(index.is_padding, 0)
        d_q, d_k, d_v = (torch.empty_like(states) for states in (q, k, v))
        probabilities = iter(kept)
        for group in packing.groups:
            group_q, group_k, group_v, group_d_out = _of_group(group, kv_heads, v.shape[1], q, k, v, d_out)
            group_d_q, group_d_k, group_d_v, _ = _of_group(group, kv_heads, v.shape[1], d_q, d_k, d_v, d_out)
            for number, block in enumerate(group.query_blocks):
                rows, keys = _block(block, group_q, group)
                p = next(probabilities)
                d_p = torch.bmm(group_d_out[:, rows], group_v[:, keys].mT)
                dropped = p
                if ctx.dropout:
                    factors = next(probabilities)
                    dropped = p * factors
                    d_p.mul_(factors)
                d_s = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)
                group_d_q[:, rows] = torch.bmm(d_s, group_k[:, keys])
                # A block adds to the keys that earlier blocks saw, and is the first to see the others.
                seen = group.query_blocks[number - 1][1] if number else 0
                for target, product in (
                    (group_d_k, torch.bmm(d_s.mT, group_q[:, rows])),
                    (group_d_v, torch.bmm(dropped.mT, group_d_out[:, rows])),
                ):
                    target[:, seen : block[1]] = product[:, seen:]
                    if seen:
                        target[:, :seen] += product[:, :seen]
        d_query, d_key, d_value = (states.index_select(0, index.packed_to_padded) for states in (d_q, d_k, d_v))
        tokens = len(gradient)
        return (
            d_query.mul_(ctx.scale).view(tokens, gradient.shape[1], -1),
            d_key.mul_(ctx.scale).view(tokens, kv_heads, -1),
            d_value.view(tokens, kv_heads, -1),
            None,
            None,
            None,
        )


def _pad_heads(states: Tensor, index: HeadIndex, kv_heads: int) -> Tensor:
    """`[tokens, heads, width]` -> `[padded tokens x kv_heads, heads / kv_heads x width]`."""
    return states.reshape(len(states) * kv_heads, -1).index_select(0, index.padded_to_packed)


def _of_group(group: RowGroup, kv_heads: int, value_width: int, *padded: Tensor) -> list[Tensor]:
    """Queries, keys, values and outputs of a group of rows, as views.

    Returns:
        Keys and values as `[rows x kv_heads, length, width]`, the others as
        `[rows x kv_heads, length x heads / kv_heads, width]`.
    """
    part = slice(group.start * kv_heads, (group.start + group.size) * kv_heads)
    widths = (padded[1].shape[1], padded[1].shape[1], value_width, value_width)
    return [states[part].view(group.rows * kv_heads, -1, width) for states, width in zip(padded, widths, strict=True)]


def _block(block: tuple[int, int], queries: Tensor, group: RowGroup) -> tuple[slice, slice]:
    """The rows of `queries` `[..., length x heads, width]` that are in a block, and the keys that they can see."""
    shared = queries.shape[1] // group.length
    return slice(block[0] * shared, block[1] * shared), slice(block[1])


def _probabilities(query: Tensor, key: Tensor, packing: Packing, block: tuple[int, int], scale: float) -> Tensor:
    """softmax(scale Q K^T) of a block of queries, `[batch, queries, keys]`, in the dtype of `query`.

    The scores of bf16 states are summed and kept in fp32: rounded to bf16, a score of 30 is wrong by a tenth.
    """
    exact = torch.float64 if query.dtype is torch.float64 else torch.float32
    mask = packing.causal_mask(block, query.shape[1] // (block[1] - block[0]), exact)
    with _products_of_bf16(query.dtype):
        scores = torch.baddbmm(mask, query.to(exact), key.to(exact).mT, alpha=scale)
    return torch.softmax(scores, -1, out=scores).to(query.dtype)


@contextmanager
def _products_of_bf16(dtype: torch.dtype) -> Iterator[None]:
    """fp32 products of numbers that are bf16 already are computed by the units for bf16, which loses nothing."""
    if dtype is not torch.bfloat16:
        yield
        return
    # The module's type has no such attribute: it is set on a subclass.
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
