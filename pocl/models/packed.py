"""Sequence packing: the samples of a batch concatenated instead of padded.

The layers of a model treat tokens alike but for attention, which must not cross from one sample into the next. It is
replaced through the attention interface of transformers while a packed batch is run.
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
_PROBE_LENGTH = 9
"""Tokens of the longest sample that :func:`can_pack` tries."""


@contextmanager
def packed_attention(model: PreTrainedModel, lengths: Sequence[int]) -> Iterator[None]:
    """While the context lasts, `model` takes concatenated samples of these lengths, `[1, sum of lengths]`."""
    config = model.config
    before = config._attn_implementation
    token = _lengths.set(tuple(lengths))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _lengths.reset(token)


def can_pack(model: PreTrainedModel, max_length: int) -> bool:
    """Whether packed samples of up to `max_length` tokens give the logits that each gives by itself.

    The model is tried. A family without position ids, with a window shorter than a sample, or with a recurrent state
    cannot be packed, and neither can a model that fails.
    """
    window = getattr(model.config, "sliding_window", None)
    if window is not None and window < max_length:
        return False
    was_training = model.training
    model.train(False)
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            return _agrees(model, min(_PROBE_LENGTH, max_length))
    except Exception:  # noqa: BLE001 # A model may fail in any way; it is then run with padding, as all can be.
        return False
    finally:
        model.train(was_training)


def _agrees(model: PreTrainedModel, length: int) -> bool:
    """Whether three random samples of up to `length` tokens give the same logits packed and each by itself."""
    generator = torch.Generator().manual_seed(0)
    lengths = [length, max(1, length // 2), length]
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    samples = [torch.randint(vocabulary, (1, length), generator=generator).to(model.device) for length in lengths]
    positions = [torch.arange(length, device=model.device)[None] for length in lengths]
    separate = [
        model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
        for ids, position_ids in zip(samples, positions, strict=True)
    ]
    with packed_attention(model, lengths):
        packed = model(input_ids=torch.cat(samples, 1), position_ids=torch.cat(positions, 1), use_cache=False).logits
    expected = torch.cat(separate, 1).float()
    # Rounding of half-precision weights is of the order of a hundredth; attention across samples, of one.
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return bool((packed.float() - expected).abs().max() <= tolerance * expected.abs().max())


def _attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Causal attention within each packed sample.

    Args:
        query, key, value: `[1, heads, tokens, width]`; keys and values have fewer heads where heads share them.

    Returns:
        `[1, tokens, heads, width]`, and None for the attention weights.

    Raises:
        ValueError: the model caps attention scores, which none of the kernels here can.
    """
    if options.get("softcap") is not None:
        raise ValueError("attention scores are capped")
    lengths = _lengths.get()
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return _varlen(query, key, value, lengths, scaling), None
    has_shared_heads = query.shape[1] != key.shape[1]
    samples = zip(*(torch.split(states, list(lengths), 2) for states in (query, key, value)), strict=True)
    attended = [
        F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=has_shared_heads
        )
        for q, k, v in samples
    ]
    return torch.cat(attended, 2).transpose(1, 2), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float | None) -> Tensor:
    ends = torch.tensor((0, *lengths), device=query.device).cumsum(0).int()
    longest = max(lengths)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    attended = varlen_attn(
        q,
        k,
        v,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        # Causal: no keys to the right, all to the left.
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)  # It returns a tuple only where auxiliary outputs are requested.
    return attended.unsqueeze(0)


AttentionInterface.register(NAME, _attention)
