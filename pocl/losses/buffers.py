"""Formats, sizes and memory of a pass over the tokens of a micro-batch, settled before its first product."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocl.models.output_head import Head, HeadInputs

HALF = (torch.bfloat16, torch.float16)
_SMALLEST_CHUNK, _LARGEST_CHUNK = 512, 2048
_CHUNK_BYTES = 160 << 20
"""Of the logits of one model in a chunk on a CPU, as the product gives them."""
_TILE_BYTES = 6 << 20
"""Of one buffer of a tile on a CPU, which is to stay in the processor's cache."""


def default_chunk_tokens(vocabulary: int, number_bytes: int) -> int:
    """Tokens of a chunk on a CPU: the fewer chunks, the fewer passes over the gradient of the head's weight.

    It is the largest power of two whose logits fit into 160 MiB, and from 512 to 2,048.

    Args:
        vocabulary: Tokens of the larger head.
        number_bytes: Of a number in products.
    """
    fitting = _CHUNK_BYTES // (vocabulary * number_bytes)
    return min(_LARGEST_CHUNK, max(_SMALLEST_CHUNK, 1 << max(0, fitting.bit_length() - 1)))


class Workspace:
    """A buffer pool: memory by name that is kept from one micro-batch to the next, as large as was ever needed.

    The operating system zeroes new memory, which costs a CPU as much time as a pass over it.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`[tokens, width]`, contiguous, with whatever was in it before."""
        memory, needed = self._memory.get(name), tokens * width
        if memory is None or memory.numel() < needed or memory.dtype != dtype or memory.device != device:
            # The smaller buffer is freed before the larger one is allocated.
            self._memory.pop(name, None)
            memory = self._memory[name] = torch.empty(needed, dtype=dtype, device=device)
        return memory[:needed].view(tokens, width)


@dataclass(frozen=True)
class LossExecution:
    """How a pass over the tokens is run; results differ by rounding at most."""

    chunk_tokens: int | None = None
    """The most tokens whose logits exist at a time; None takes :func:`default_chunk_tokens`."""
    workspace: Workspace | None = None
    """Buffers of earlier passes, which then need not be allocated again; None allocates anew."""
    backend: str | Callable[..., Any] | None = None
    """The backend of torch.compile for the elementwise part of the distillation objective; None compiles nothing."""


@dataclass(frozen=True)
class Sizes:
    """How many tokens are worked on at a time, and in which format losses are computed."""

    chunks: tuple[tuple[slice, tuple[tuple[slice, slice], ...]], ...]
    """The tokens of each chunk, whose logits exist at a time, and its tiles: their tokens, counted from the first of
    all and from the first of the chunk."""
    chunk: int
    """Tokens of the largest chunk, at least 1."""
    tile: int
    """Tokens of a chunk whose losses are computed at a time; 0 where a compiled function takes whole chunks."""
    dtype: torch.dtype
    """Of the losses: float64 where a product is in float64, else float32."""
    device: torch.device


@dataclass(frozen=True)
class HeadBuffers:
    """Memory of the products with one output head."""

    linear: Tensor
    """`[chunk, V]` for W h + b, in the format in which the product gives it."""
    logits: Tensor | None
    """`[tile, V]` in the format of the losses; None where `linear` has it already."""
    cap_derivative: Tensor | None
    """`[tile, V]` in the format of the losses; None without a soft cap and where no gradient is computed."""


@dataclass(frozen=True)
class TileBuffers:
    """Memory of the distributions of a tile, each `[tile, shared width]` in the format of the losses."""

    log_p: Tensor
    log_q: Tensor
    q: Tensor


@dataclass(frozen=True)
class PairBuffers:
    """Memory of a pass with the output heads of both models."""

    student: HeadBuffers
    teacher: HeadBuffers
    tile: TileBuffers


@dataclass
class GradientBuffers:
    """Gradients of the loss with regard to what an output head is applied to and what it has, summed chunk by chunk."""

    hidden: Tensor | None
    """`[tokens, d]` in the format of the products; None, here and below, where no gradient is required."""
    weight: Tensor | None
    """`[V, d]`, at least float32."""
    bias: Tensor | None
    """`[V]`, at least float32."""
    accumulates_into: Tensor | None
    """The parameter whose `.grad` receives the weight's gradient in place; None to leave that to backward."""
    is_weight_unwritten: bool
    """Whether `weight` holds no sum yet, so that the first chunk overwrites it."""


def product_hidden_states(inputs: HeadInputs, labels: Tensor) -> Tensor:
    """The hidden states, `[tokens, width]`, in the format of the head's products.

    Raises:
        ValueError: unless the hidden states are `[tokens, width of the head]` and the labels `[tokens]`.
    """
    if labels.dim() != 1 or inputs.hidden.shape != (len(labels), inputs.head.weight.shape[1]):
        raise ValueError("hidden states must be [tokens, width of their head] and labels [tokens]")
    return inputs.hidden.to(_product_dtype(inputs.head))


def loss_dtype(*hidden_states: Tensor) -> torch.dtype:
    """The format of the losses: float64 if one of the hidden states, in the format of its product, is, else float32."""
    return torch.float64 if any(hidden.dtype == torch.float64 for hidden in hidden_states) else torch.float32


def plan_sizes(
    hidden: Tensor, heads: Sequence[Head], dtype: torch.dtype, chunk_tokens: int | None, *, in_tiles: bool = True
) -> Sizes:
    """How many tokens to work on at a time.

    Args:
        hidden: The hidden states of all tokens, `[tokens, width]`.
        heads: The output heads whose logits exist at the same time.
        dtype: The format of the losses.
        chunk_tokens: The most tokens of a chunk; None takes :func:`default_chunk_tokens`.
        in_tiles: Whether chunks are cut into tiles.

    Raises:
        ValueError: for a chunk of less than 1 token.
    """
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError("chunk_tokens must be at least 1")
    tokens, device = len(hidden), hidden.device
    vocabulary = max(len(head.weight) for head in heads)
    limit = chunk_tokens or default_chunk_tokens(vocabulary, hidden.dtype.itemsize)
    # Chunks of one size need smaller buffers than full ones and a rest.
    chunk = max(1, math.ceil(tokens / max(1, math.ceil(tokens / limit))))
    in_cache = max(1, _TILE_BYTES // (vocabulary * dtype.itemsize))
    tile = min(in_cache, chunk) if device.type == "cpu" else chunk
    chunks = []
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        edges = [(first, min(first + tile, stop)) for first in range(start, stop, tile)] if in_tiles else []
        tiles = tuple((slice(first, last), slice(first - start, last - start)) for first, last in edges)
        chunks.append((slice(start, stop), tiles))
    return Sizes(chunks=tuple(chunks), chunk=chunk, tile=tile if in_tiles else 0, dtype=dtype, device=device)


def head_buffers(
    head: Head, sizes: Sizes, workspace: Workspace, name: str, *, with_gradient: bool = False
) -> HeadBuffers:
    """Memory of the products with `head`; `name` tells the memory of two heads apart."""
    vocabulary, product = len(head.weight), _product_dtype(head)
    # CUDA gives the sums of a half-precision product unrounded.
    dtype = torch.float32 if product in HALF and head.weight.is_cuda else product

    def tile(what: str) -> Tensor:
        return workspace.take(f"{name} {what}", sizes.tile, vocabulary, sizes.dtype, sizes.device)

    return HeadBuffers(
        linear=workspace.take(f"{name} linear", sizes.chunk, vocabulary, dtype, head.weight.device),
        logits=tile("logits") if dtype != sizes.dtype else None,
        cap_derivative=tile("cap derivative") if with_gradient and head.softcap is not None else None,
    )


def tile_buffers(sizes: Sizes, shared_width: int, workspace: Workspace) -> TileBuffers:
    """Memory of the distributions of a tile over `shared_width` ids."""
    log_p, log_q, q = (
        workspace.take(name, sizes.tile, shared_width, sizes.dtype, sizes.device) for name in ("log_p", "log_q", "q")
    )
    return TileBuffers(log_p, log_q, q)


def pair_buffers(
    student: Head,
    teacher: Head,
    sizes: Sizes,
    shared_width: int,
    workspace: Workspace,
    *,
    with_gradient: bool = False,
) -> PairBuffers:
    """Memory of the products with both heads, of which the student's may get a gradient, and of their distributions
    over `shared_width` ids.
    """
    return PairBuffers(
        head_buffers(student, sizes, workspace, "student", with_gradient=with_gradient),
        head_buffers(teacher, sizes, workspace, "teacher"),
        tile_buffers(sizes, shared_width, workspace),
    )


def gradient_buffers(hidden: Tensor, head: Head, dtype: torch.dtype, *, in_place: bool) -> GradientBuffers:
    """A buffer for each of `hidden` and the parameters of `head` that requires a gradient.

    Args:
        hidden: `[tokens, d]` in the format of the products.
        dtype: Of the losses, in which the parameters' gradients are summed.
        in_place: Whether the weight's gradient goes to its `.grad` rather than to autograd.

    Raises:
        ValueError: with `in_place` for a weight that is no leaf.
    """
    bias, weight = head.bias, head.weight
    parameter = weight if in_place and weight.requires_grad else None
    if parameter is not None and not parameter.is_leaf:
        raise ValueError("only a leaf has a .grad to accumulate into")
    same_format = parameter is not None and (parameter if parameter.grad is None else parameter.grad).dtype == dtype
    is_unwritten = not same_format or weight.grad is None
    if parameter is not None and parameter.grad is None:
        parameter.grad = torch.empty_like(parameter) if same_format else torch.zeros_like(parameter)
    own = torch.empty_like(weight, dtype=dtype) if weight.requires_grad and not same_format else None
    return GradientBuffers(
        hidden=torch.zeros_like(hidden) if hidden.requires_grad else None,
        weight=parameter.grad if parameter is not None and same_format else own,
        bias=torch.zeros_like(bias, dtype=dtype) if bias is not None and bias.requires_grad else None,
        accumulates_into=parameter,
        is_weight_unwritten=is_unwritten,
    )


def _product_dtype(head: Head) -> torch.dtype:
    """The format of the products with `head`: that of autocast, as a linear layer has it, else its weight's."""
    weight = head.weight
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
