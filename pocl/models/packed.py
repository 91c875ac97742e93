"""Sequence packing: the samples of a batch concatenated instead of padded.

The layers of a model treat tokens alike but for attention, which must not cross from one sample into the next. It is
replaced through the attention interface of transformers while a packed batch is run: by the varlen kernel of torch on
CUDA in half precision without dropout, else by :mod:`pocl.models.batched_attention`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from pocl.data.packing import Packing
from pocl.models.attention_span import attention_span
from pocl.models.batched_attention import batched_attention
from pocl.models.precision import Precision
from pocl.models.rounding import difference_beyond_rounding

__all__ = ["Packing", "VarlenKernel", "can_pack", "packed_attention", "reason_not_to_pack"]

NAME = "pocl_packed"
_PROBE_LENGTH = 9
"""Tokens of the longest sample that :func:`reason_not_to_pack` tries."""
_KERNEL_WIDTH_MULTIPLE = 8
_KERNEL_MAX_WIDTH = 256
"""Widths of a head that the varlen kernel takes: multiples of 8, up to 256."""


class VarlenKernel:
    """The variable-length attention of torch, with what its versions and its widths cannot do made up for."""

    def __init__(self, function: Callable[..., Any] = varlen_attn, *, device_type: str = "cuda") -> None:
        """`function` has the signature of `torch.nn.attention.varlen.varlen_attn` of torch 2.11 or later."""
        self._function = function
        self._device_type = device_type
        # Torch 2.11 has no such argument.
        self._shares_heads = "enable_gqa" in signature(function).parameters

    def applies(self, query: Tensor, value: Tensor, dropout: float) -> bool:
        """Whether the kernel runs these states: on its device, in half precision, and without dropout."""
        return (
            query.device.type == self._device_type
            and query.dtype in (torch.bfloat16, torch.float16)
            and not dropout
            and max(query.shape[-1], value.shape[-1]) <= _KERNEL_MAX_WIDTH
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing, *, scale: float) -> Tensor:
        """Causal attention within each sample; shapes as in
        :func:`~pocl.models.batched_attention.batched_attention`.
        """
        heads, kv_heads, value_width = query.shape[1], key.shape[1], value.shape[-1]
        options = {}
        if self._shares_heads:
            options["enable_gqa"] = heads != kv_heads
        elif heads != kv_heads:
            key, value = (states.repeat_interleave(heads // kv_heads, dim=1) for states in (key, value))
        # Zeros beyond the width change no score, as long as the scale is given, and the columns of values are apart.
        width = max(query.shape[-1], value_width)
        width = -(-width // _KERNEL_WIDTH_MULTIPLE) * _KERNEL_WIDTH_MULTIPLE
        query, key, value = (_widened(states, width) for states in (query, key, value))
        attended: Tensor = self._function(
            query,
            key,
            value,
            packing.cu_seqlens,
            packing.cu_seqlens,
            packing.max_length,
            packing.max_length,
            scale=scale,
            # Causal: no keys to the right, all to the left.
            window_size=(-1, 0),
            **options,
        )
        return attended[..., :value_width]


# Compiled layers have the kernel within their graph, but leave a function with a backward of its own as it is.
_batched_attention = torch.compiler.disable(batched_attention)
_kernel = VarlenKernel()
_active: tuple[Packing, VarlenKernel] | None = None
"""What :func:`packed_attention` has set. A global and no context variable, which torch.compile cannot trace."""


@contextmanager
def packed_attention(model: PreTrainedModel, packing: Packing, kernel: VarlenKernel = _kernel) -> Iterator[None]:
    """While the context lasts, `model` takes the concatenated samples of `packing`, `[1, sum of lengths]`.

    One model runs at a time in a process.
    """
    global _active  # The attention interface of transformers hands no argument of ours to the layers.
    config = model.config
    before = config._attn_implementation
    outer = _active
    _active = (packing, kernel)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _active = outer


def can_pack(model: PreTrainedModel, max_length: int, precision: Precision | None = None) -> bool:
    """Whether packed samples of up to `max_length` tokens give the logits that each gives by itself."""
    return reason_not_to_pack(model, max_length, precision) is None


def reason_not_to_pack(model: PreTrainedModel, max_length: int, precision: Precision | None = None) -> str | None:
    """Why packed samples of up to `max_length` tokens must not be given to `model`; None where they can be.

    The model is tried as it will run: on its device, with the autocast of `precision` (None for none), and in its mode.
    A model in train mode is also run with its dropout, forward and backward. A family without position ids, with a
    window shorter than a sample, or with a recurrent state cannot be packed, and neither can a model that fails.
    """
    span = attention_span(model)
    if span is not None and span < max_length:
        return f"it attends to the last {span} tokens, and samples may have {max_length}"
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    precisions = [Precision("fp32", model.device), *([] if precision is None else [precision])]
    length = min(_PROBE_LENGTH, max_length)
    try:
        # Dropout draws; the generators are left as they were.
        with torch.random.fork_rng(devices):
            for each in dict.fromkeys(precisions):
                with each.autocast():
                    reason = _difference(model, length) or (
                        _failure_in_training(model, length) if was_training else None
                    )
                if reason is not None:
                    return f"{reason} ({each.name})"
            return None
    except Exception as error:  # noqa: BLE001 # A model may fail in any way; it is then run with padding, as all can be.
        return f"it fails on packed samples: {error or type(error).__name__}"
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class _Probe:
    """Three random samples of up to `length` tokens for a model, packed and each by itself."""

    model: PreTrainedModel
    samples: tuple[Tensor, ...]
    """[1, tokens] int64 each."""
    packing: Packing

    @classmethod
    def of(cls, model: PreTrainedModel, length: int) -> "_Probe":
        generator = torch.Generator().manual_seed(0)
        lengths = [length, max(1, length // 2), length]
        vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
        samples = (torch.randint(vocabulary, (1, length), generator=generator) for length in lengths)
        return cls(model, tuple(ids.to(model.device) for ids in samples), Packing.of(lengths, model.device))

    def packed_logits(self) -> Tensor:
        """`[1, tokens of all, V]`."""
        with packed_attention(self.model, self.packing):
            return self._logits(torch.cat(self.samples, 1), self.packing.position_ids)

    def separate_logits(self) -> Tensor:
        """The same of each sample by itself."""
        positions = self.packing.position_ids.split(self.packing.lengths, 1)
        pairs = zip(self.samples, positions, strict=True)
        return torch.cat([self._logits(ids, position_ids) for ids, position_ids in pairs], 1)

    def _logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return logits.float()


@torch.no_grad()
def _difference(model: PreTrainedModel, length: int) -> str | None:
    """How packed samples differ from separate ones in eval mode, beyond rounding."""
    model.train(False)
    probe = _Probe.of(model, length)
    is_exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    difference = difference_beyond_rounding(probe.packed_logits(), probe.separate_logits(), is_exact=is_exact)
    if difference is None:
        return None
    return f"packed samples give logits that differ by {difference:.0%} from those of each sample by itself"


def _failure_in_training(model: PreTrainedModel, length: int) -> str | None:
    """Run packed samples in train mode, with dropout, forward and backward."""
    model.train(True)
    logits = _Probe.of(model, length).packed_logits()
    weights = [weight for weight in model.get_input_embeddings().parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(logits.sum(), weights) if weights else ()
    return None if all(gradient.isfinite().all() for gradient in gradients) else "its gradient is not finite"


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
    """Causal attention within each packed sample, in the format of autocast where that is on.

    Args:
        query, key, value: `[1, heads, tokens, width]`; keys and values have fewer heads where heads share them.

    Returns:
        `[1, tokens, heads, width]`, and None for the attention weights.

    Raises:
        ValueError: the model caps attention scores, which none of the kernels here can.
    """
    if options.get("softcap") is not None:
        raise ValueError("attention scores are capped")
    assert _active is not None  # The context manager sets the implementation and this together.
    packing, kernel = _active
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    # Rotary embeddings leave queries and keys in fp32 under autocast, which neither kernels nor products are to see.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    if kernel.applies(query, value, dropout):
        attended = kernel(query, key, value, packing, scale=scale)
    else:
        attended = _batched_attention(query, key, value, packing, scale=scale, dropout=dropout)
    return attended.unsqueeze(0), None


def _widened(states: Tensor, width: int) -> Tensor:
    """`[tokens, heads, width or less]` with zeros up to `width`."""
    missing = width - states.shape[-1]
    return F.pad(states, (0, missing)) if missing else states


AttentionInterface.register(NAME, _attention)
