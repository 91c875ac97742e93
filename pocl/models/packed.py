"""Rows of a batch one behind the other instead of one below the other, so that nothing is padding.

The layers of a model treat tokens alike, but for attention, which must not cross from one row into the next. It is
exchanged through the attention interface of transformers while a packed batch is run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

NAME = "pocl_packed"
_lengths: ContextVar[tuple[int, ...]] = ContextVar("_lengths")
_LONGEST_PROBE = 9


@contextmanager
def packed_attention(model: PreTrainedModel, lengths: Sequence[int]) -> Iterator[None]:
    """Within it `model` takes rows of these lengths one behind the other, `[1, sum of lengths]`."""
    config = model.config
    before = config._attn_implementation
    token = _lengths.set(tuple(lengths))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _lengths.reset(token)


def can_pack(model: PreTrainedModel, longest: int) -> bool:
    """Whether packed rows of up to `longest` tokens give what the same rows give alone.

    Found out by trying: of a family that does without positions, attends to a window, or carries a state along, the
    answer is no, and so it is where anything goes wrong.
    """
    window = getattr(model.config, "sliding_window", None)
    if window is not None and window < longest:
        return False
    was_training = model.training
    model.train(False)
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            return _agrees(model, min(_LONGEST_PROBE, longest))
    except Exception:  # noqa: BLE001 # A model may fail in any way; it is then run with padding, as all can be.
        return False
    finally:
        model.train(was_training)


def _agrees(model: PreTrainedModel, longest: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    lengths = [longest, max(1, longest // 2), longest]
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    rows = [torch.randint(vocabulary, (1, length), generator=generator).to(model.device) for length in lengths]
    positions = [torch.arange(length, device=model.device)[None] for length in lengths]
    alone = [
        model(input_ids=row, position_ids=place, use_cache=False).logits
        for row, place in zip(rows, positions, strict=True)
    ]
    with packed_attention(model, lengths):
        together = model(input_ids=torch.cat(rows, 1), position_ids=torch.cat(positions, 1), use_cache=False).logits
    wanted = torch.cat(alone, 1).float()
    # Rounding of half-precision weights is of the order of a hundredth; attention across rows, of one.
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return bool((together.float() - wanted).abs().max() <= tolerance * wanted.abs().max())


def _attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """`[1, heads, tokens, width]` each, keys and values with fewer heads where they are shared, to `[1, tokens, ...]`.

    Raises:
        ValueError: the model caps attention scores, which no kernel here does.
    """
    if others.get("softcap") is not None:
        raise ValueError("attention scores are capped")
    lengths = _lengths.get()
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return _varlen(query, key, value, lengths, scaling), None
    shared = query.shape[1] != key.shape[1]
    rows = zip(*(torch.split(each, list(lengths), 2) for each in (query, key, value)), strict=True)
    attended = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=shared)
        for q, k, v in rows
    ]
    return torch.cat(attended, 2).transpose(1, 2), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float | None) -> Tensor:
    ends = torch.tensor((0, *lengths), device=query.device).cumsum(0).int()
    longest = max(lengths)
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    attended = varlen_attn(
        q,
        k,
        v,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        # No keys to the right, all to the left.
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)  # It returns more only when asked for more.
    return attended.unsqueeze(0)


AttentionInterface.register(NAME, _attention)
