"""The training objective from hidden states: the output heads and the loss in one, without logits of the batch.

For a chunk of tokens at a time, both heads are applied, and the student's logits become the gradient of the
loss with regard to themselves, in place and in closed form; from there it goes on to hidden states and head.
That makes four products with a head, none of them computed again, and memory for chunk x vocabulary logits.
The loss is that of :mod:`pocl.losses.objective`, which stays the definition.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pocl.losses.objective import IGNORED, ObjectiveSum, check_numbers, mix, shared_width, tau_squared
from pocl.losses.projection import HeadGradients, Projection, product_dtype
from pocl.losses.registry import divergence_of
from pocl.losses.tile import LossTerms, Scratch, TokenLosses, Workspace, token_losses_and_grad_
from pocl.models.output_head import Head
from pocl.spec import SFT, Method

_CHUNK = 512
"""Tokens, on a CPU; fewer make the passes over the weight's gradient tell."""
_TILE_BYTES = 6 << 20
"""Of one buffer of a tile, on a CPU."""
_CUDA_BUDGET = 2 << 30
"""Bytes that the buffers of a chunk may take, if a quarter of the free memory is not less."""
_CUDA_BUFFERS = 9
"""Of a chunk's size in fp32, counting those that a divergence makes for itself."""


def fused_objective_sum(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor | None,
    teacher: Head | None,
    labels: Tensor,
    *,
    method: Method,
    temperature: float,
    kd_weight: float,
    shared_vocabulary: int | None,
    scale: float = 1.0,
    chunk_tokens: int | None = None,
    accumulate_into_grad: bool = False,
    workspace: Workspace | None = None,
) -> ObjectiveSum:
    """:func:`pocl.losses.objective.objective_sum` of the logits of both heads.

    Products are in the autocast format where autocast is on, else in that of each head's weight; softmax and
    divergence are in float32, or in float64 where a weight is. Gradients go to `student_hidden` and to the
    student's weight and bias, each if it requires one; they are computed here, and backward hands them on, once.

    Args:
        student_hidden: what the student's head is applied to, `[tokens, its width]`.
        student: the student's head.
        teacher_hidden: `[tokens, its width]`; like `teacher` not read for `sft`, where both may be None.
        teacher: the teacher's head, which gets no gradient.
        labels, method, temperature, kd_weight, shared_vocabulary: as for `objective_sum`.
        scale: multiplies loss and gradient, not the other sums. With the step's normaliser here, backward
            starts from 1 and need not touch the gradients again.
        chunk_tokens: tokens whose logits exist at a time; by default from the device and its free memory.
        accumulate_into_grad: add the weight's gradient to `weight.grad` here rather than in backward, which
            saves a buffer of its size. Forward and backward then come in pairs, backward starts from 1, and
            nothing may wait for this gradient: no hook, no reduction over several processes. Nothing is added
            where gradients are off.
        workspace: buffers to work in; given again, they need not be made again.

    Raises:
        ValueError: for shapes or numbers that do not fit together.
    """
    check_numbers(temperature, kd_weight)
    if not math.isfinite(scale):
        raise ValueError("scale must be finite")
    rows = _rows(student_hidden, student, teacher_hidden, teacher, labels, method)
    weight = 0.0 if rows.teacher is None else kd_weight
    tau_factor = tau_squared(method, temperature)
    terms = LossTerms(
        divergence_of(method),
        temperature,
        rows.width(shared_vocabulary),
        cross_entropy=scale * student.scale * (1 - weight),
        divergence=scale * student.scale * weight * tau_factor,
    )
    gradients = None
    if torch.is_grad_enabled():
        hidden = rows.student.hidden
        gradients = HeadGradients.wanted(hidden, student, rows.dtype, into_grad=accumulate_into_grad)
    with torch.no_grad():
        # A scale of 0 leaves the gradients at the zeros that they start from.
        wanted = gradients if scale != 0 else None
        cross_entropies, divergences = _sweep(rows, terms, chunk_tokens, wanted, workspace)
        loss = cross_entropy = cross_entropies.sum()
        divergence = None
        if divergences is not None:
            divergence = divergences.sum()
            loss = mix(cross_entropy, tau_factor * divergence, weight)
        loss = loss * scale
    if gradients is not None:
        gradients.finish()
        # torch leaves `apply` without annotations.
        apply: Any = _WithGradients.apply
        loss = apply(loss, gradients, rows.student.hidden, student.weight, student.bias)
    return ObjectiveSum(loss, cross_entropy, divergence, len(rows.labels))


@torch.no_grad()
def token_losses(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor | None,
    teacher: Head | None,
    labels: Tensor,
    *,
    method: Method,
    shared_vocabulary: int | None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy and divergence of each token, without gradient; arguments as above.

    Returns:
        Nats at temperature 1, `[tokens]`, and the divergence without tau squared, `[tokens]`, which is None for
        `sft`. Both are 0 where the label is `IGNORED`.

    Raises:
        ValueError: for shapes or numbers that do not fit together.
    """
    check_numbers(temperature, 0.0)
    rows = _rows(student_hidden, student, teacher_hidden, teacher, labels, method)
    terms = LossTerms(
        divergence_of(method), temperature, rows.width(shared_vocabulary), cross_entropy=0.0, divergence=0.0
    )
    cross_entropy, divergence = _sweep(rows, terms, chunk_tokens, None, workspace)
    valid = labels != IGNORED
    whole = cross_entropy.new_zeros(labels.shape)
    if divergence is None:
        return whole.masked_scatter(valid, cross_entropy), None
    return whole.masked_scatter(valid, cross_entropy), whole.masked_scatter(valid, divergence)


@dataclass(frozen=True)
class _Side:
    hidden: Tensor
    """`[valid tokens, width]` in the format of the products."""
    head: Head


@dataclass(frozen=True)
class _Rows:
    """The valid tokens."""

    student: _Side
    teacher: _Side | None
    labels: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The format of the losses."""
        sides = [self.student] if self.teacher is None else [self.student, self.teacher]
        return torch.float64 if any(side.hidden.dtype == torch.float64 for side in sides) else torch.float32

    def width(self, shared_vocabulary: int | None) -> int:
        own = len(self.student.head.weight)
        return own if self.teacher is None else shared_width(own, len(self.teacher.head.weight), shared_vocabulary)


def _rows(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor | None,
    teacher: Head | None,
    labels: Tensor,
    method: Method,
) -> _Rows:
    sides = [("student", student_hidden, student)]
    if not isinstance(method, SFT):
        if teacher_hidden is None or teacher is None:
            raise ValueError(f"{method.name} needs teacher_hidden and teacher")
        sides.append(("teacher", teacher_hidden.detach(), teacher))
    for name, hidden, head in sides:
        if hidden.shape != (*labels.shape, head.weight.shape[1]) or labels.dim() != 1:
            raise ValueError(f"{name}_hidden must be [tokens, width of its head] and labels [tokens]")
    valid = labels != IGNORED
    of_student, *of_teacher = [_Side(hidden[valid].to(product_dtype(head)), head) for _, hidden, head in sides]
    return _Rows(of_student, of_teacher[0] if of_teacher else None, labels[valid])


def _sweep(
    rows: _Rows,
    terms: LossTerms,
    chunk_tokens: int | None,
    gradients: HeadGradients | None,
    workspace: Workspace | None,
) -> TokenLosses:
    """Losses of all tokens, chunk by chunk, and into `gradients` what comes of them."""
    tokens, device = len(rows.labels), rows.labels.device
    vocabulary = max(len(side.head.weight) for side in (rows.student, rows.teacher) if side is not None)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError("chunk_tokens must be at least 1")
    chunk = max(1, min(chunk_tokens or _chunk_tokens(device, tokens, vocabulary), tokens))
    workspace = workspace or Workspace()
    student = Projection(rows.student.head, chunk, workspace, "student")
    teacher = None if rows.teacher is None else Projection(rows.teacher.head, chunk, workspace, "teacher")
    in_cache = max(1, _TILE_BYTES // (vocabulary * rows.dtype.itemsize))
    scratch = Scratch(min(in_cache, chunk) if device.type == "cpu" else chunk, rows.dtype, device, workspace)
    cross_entropy = torch.empty(tokens, dtype=rows.dtype, device=device)
    divergence = None if teacher is None else torch.empty_like(cross_entropy)
    # The format of every product is settled by now.
    with torch.autocast(device.type, enabled=False):
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            hidden = rows.student.hidden[part].detach()
            own = student.linear(hidden)
            theirs = None if teacher is None or rows.teacher is None else teacher.linear(rows.teacher.hidden[part])
            into = own if own.dtype == hidden.dtype else torch.empty_like(own, dtype=hidden.dtype)
            for first in range(0, len(hidden), scratch.rows):
                tile = slice(first, first + scratch.rows)
                at = slice(start + first, min(start + first + scratch.rows, part.stop))
                logits = student.logits(own[tile], scratch, "student")
                slope = student.slope(logits, scratch) if gradients is not None else None
                others = None if teacher is None or theirs is None else teacher.logits(theirs[tile], scratch, "teacher")
                losses = token_losses_and_grad_(
                    logits, others, rows.labels[at], terms, scratch, gradient=gradients is not None
                )
                cross_entropy[at], of_divergence = losses
                if divergence is not None and of_divergence is not None:
                    divergence[at] = of_divergence
                if gradients is not None:
                    _hand_over(logits, slope, into[tile])
            if gradients is not None:
                gradients.add(into, hidden, student.weight, part)
    return cross_entropy, divergence


def _hand_over(gradient: Tensor, slope: Tensor | None, into: Tensor) -> None:
    """From the gradient of capped logits to that of the linear ones, in the format of the products."""
    if slope is not None:
        gradient.mul_(slope)
    if gradient.data_ptr() != into.data_ptr():
        into.copy_(gradient)


def _chunk_tokens(device: torch.device, tokens: int, vocabulary: int) -> int:
    largest = _CHUNK
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator holds for later is free as well.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        largest = max(16, min(_CUDA_BUDGET, free // 4) // (4 * _CUDA_BUFFERS * vocabulary))
    # Chunks of one size need smaller buffers than a full one and a rest.
    return math.ceil(tokens / max(1, math.ceil(tokens / largest)))


class _WithGradients(torch.autograd.Function):
    """The loss, joined to the graph with gradients that are there already."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: HeadGradients, _hidden: Tensor, _weight: Tensor, _bias: Tensor | None
    ) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor | None, ...]:
        gradients: HeadGradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError("the gradients of a fused objective can be had once")
        # With no reference left here, autograd keeps the very buffers as `.grad`.
        ctx.gradients = None
        if gradients.into is not None and seed.item() != 1:
            raise RuntimeError("a weight's gradient that is in place already wants backward to start from 1: use scale")
        if seed.device.type != "cpu" or seed.item() != 1:
            gradients.multiply(seed)
        return None, None, gradients.hidden, gradients.weight, gradients.bias
