"""Stand-ins for `torch.nn.attention.varlen.varlen_attn` of several versions of torch, which run on any device."""

from typing import Any

import torch
from torch import Tensor


def varlen_attn_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """The signature of torch 2.11: heads of keys are not shared."""
    assert return_aux is None
    assert query.shape[1] == key.shape[1]
    assert max_q == max_k
    return _attend(query, key, value, cu_seq_q, cu_seq_k, scale, window_size)


def varlen_attn_2_12(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """The signature of torch 2.12 and 2.13."""
    assert [return_aux, seqused_k, block_table, num_splits] == [None] * 4
    assert max_q == max_k
    assert enable_gqa == (query.shape[1] != key.shape[1])
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    assert cu_seq_k is not None
    return _attend(query, key, value, cu_seq_q, cu_seq_k, scale, window_size)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    """Attention with a mask over all tokens at once, in fp32 or wider."""
    assert window_size == (-1, 0)
    assert scale is not None
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    exact = torch.promote_types(query.dtype, torch.float32)
    token = torch.arange(len(query), device=query.device)
    sample = torch.searchsorted(cu_seq_q, token, right=True)
    sees = (sample[:, None] == sample) & (token[:, None] >= token)
    scores = torch.einsum("qhd,khd->hqk", query.to(exact), key.to(exact)) * scale
    probabilities = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value.to(exact)).to(query.dtype)
