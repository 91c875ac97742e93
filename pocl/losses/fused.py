"""Output head and objective in one: chunk by chunk, with the gradient computed in the forward pass.

Full logits `[tokens, vocabulary]` never exist. For each chunk of tokens both heads are applied, the student's logits
are overwritten by the gradient with respect to them in closed form, and that is multiplied into the gradients of the
hidden states and of the head: four products of the head's size, nothing recomputed. Memory is O(chunk x vocabulary).

The same in value and gradient as :func:`pocl.losses.objective.objective_sum` on full logits, which stays the reference.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pocl.losses.closed_form import ClosedForm, closed_form_of
from pocl.losses.objective import (
    IGNORED,
    ObjectiveSum,
    at_least_float32,
    check_numbers,
    shared_width,
    tau_squared,
)
from pocl.models.output_head import Head
from pocl.spec import Method

_CHUNK_TOKENS = 512
"""On a CPU fewer tokens make the products small, and more make the logits leave the cache for nothing."""
_CHUNK_BYTES_CUDA = 512 << 20
_TILE_BYTES = 6 << 20
"""Of one buffer. Elementwise work on a CPU goes over rows that fit into its cache together."""


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
    accumulate_into_grad: bool = False,
    chunk_tokens: int | None = None,
) -> ObjectiveSum:
    """Sum the objective over the tokens whose label is not `IGNORED`; arguments not named here as `objective_sum`.

    Args:
        student_hidden: `[T, width]`, what the student's head is applied to. Under autocast the products are made in
            its type and the softmax in float32.
        teacher_hidden: `[T, teacher's width]`; None for `sft`.
        scale: Multiplies the loss and its gradient, but not the two terms that are reported beside it. The
            normaliser of the step belongs here: with it, the gradient needs no second pass.
        accumulate_into_grad: Add the gradient of the student's head to its `.grad` here and now, instead of in the
            backward pass, which saves a copy of its size. Every forward pass then counts, so follow each by its
            backward pass.
        chunk_tokens: Tokens whose logits exist at once; None chooses.

    Raises:
        ValueError: for shapes or numbers that do not fit together.
    """
    check_numbers(temperature, kd_weight)
    if labels.shape != student_hidden.shape[:1] or student_hidden.dim() != 2:
        raise ValueError("student_hidden must be [tokens, width] and labels [tokens]")
    form = closed_form_of(method)
    if form is not None and (teacher_hidden is None or teacher is None):
        raise ValueError(f"{method.name} needs teacher_hidden and the teacher's head")
    valid = labels != IGNORED
    if not bool(valid.all()):
        student_hidden, labels = student_hidden[valid], labels[valid]
        teacher_hidden = None if teacher_hidden is None else teacher_hidden[valid]
    side = None
    if form is not None and teacher_hidden is not None and teacher is not None:
        if teacher_hidden.shape[0] != labels.shape[0]:
            raise ValueError("teacher_hidden must have the student's tokens")
        width = shared_width(student.weight.shape[0], teacher.weight.shape[0], shared_vocabulary)
        weight = kd_weight * tau_squared(method, temperature)
        side = _TeacherSide(teacher_hidden.detach(), teacher, form, width, temperature, weight)
    task = _Task(
        student=student,
        labels=labels,
        teacher=side,
        ce_weight=1.0 if side is None else 1 - kd_weight,
        scale=scale,
        chunk=chunk_tokens or _chunk_tokens(student.weight),
        compute=_compute_type(student_hidden, student.weight),
        accumulate=accumulate_into_grad,
    )
    # The method carries no annotations in torch.
    sums = _Fused.apply(student_hidden, student.weight, student.bias, task)  # type: ignore[no-untyped-call]
    loss, cross_entropy, divergence = sums
    return ObjectiveSum(loss, cross_entropy, None if side is None else divergence, labels.shape[0])


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
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy and divergence of each token, `[T]` each, without gradient; no divergence without a teacher."""
    form = closed_form_of(method) if teacher is not None else None
    side = None
    if form is not None and teacher is not None and teacher_hidden is not None:
        width = shared_width(student.weight.shape[0], teacher.weight.shape[0], shared_vocabulary)
        side = _TeacherSide(teacher_hidden, teacher, form, width, temperature, 1.0)
    compute = _compute_type(student_hidden, student.weight)
    chunk = chunk_tokens or _chunk_tokens(student.weight)
    task = _Task(student, labels, side, 1.0, 1.0, chunk, compute, accumulate=False)
    entropies, divergences = [], []
    for start in range(0, labels.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = _logits(student_hidden[part], student, compute)
        entropy, divergence = _charge(task, logits, part, gradient=False)
        entropies.append(entropy)
        divergences.append(divergence)
    none = student_hidden.new_zeros(0, dtype=torch.float32)
    return torch.cat([none, *entropies]), None if side is None else torch.cat([none, *divergences])


@dataclass(frozen=True)
class _TeacherSide:
    hidden: Tensor
    head: Head
    form: ClosedForm
    width: int
    """Ids below it are compared."""
    temperature: float
    weight: float
    """w tau^2, or w."""


@dataclass(frozen=True)
class _Task:
    student: Head
    labels: Tensor
    teacher: _TeacherSide | None
    ce_weight: float
    scale: float
    chunk: int
    compute: torch.dtype
    """What the products are made in."""
    accumulate: bool


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Of what needs no gradient none is computed: a frozen head, or frozen layers below a trained head.
        to_hidden, to_weight, to_bias, _ = ctx.needs_input_grad
        exact = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.zeros_like(hidden) if to_hidden else None
        d_weight = _gradient_buffer(weight, task.accumulate) if to_weight else None
        d_bias = _gradient_buffer(bias, task.accumulate) if to_bias and bias is not None else None
        sums = torch.zeros(2, dtype=exact, device=hidden.device)
        matrix = task.student.weight.detach().to(task.compute)
        for start in range(0, hidden.shape[0], task.chunk):
            part = slice(start, start + task.chunk)
            rows = hidden[part].detach().to(task.compute)
            logits = _logits(rows, task.student, task.compute, matrix)
            entropy, divergence = _charge(task, logits, part, gradient=any(ctx.needs_input_grad))
            sums += torch.stack([entropy.sum(), divergence.sum()]).to(exact)
            # From here on `logits` holds the gradient.
            slope = logits.to(task.compute)
            if d_hidden is not None:
                d_hidden[part] = (slope @ matrix).to(d_hidden.dtype)
            if d_weight is not None:
                _add_product(d_weight, slope, rows)
            if d_bias is not None:
                d_bias += logits.sum(dim=0)
        ctx.save_for_backward(d_hidden, *((None, None) if task.accumulate else (d_weight, d_bias)))
        cross_entropy, divergence = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return _total(task, cross_entropy, divergence), cross_entropy, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        # The usual case costs no pass over a matrix of the head's size. Elsewhere looking would make the device wait.
        if d_loss.device.type != "cpu" or d_loss.item() != 1:
            gradients = tuple(None if each is None else each * d_loss.to(each.dtype) for each in gradients)
        return (*gradients, None)


def _total(task: _Task, cross_entropy: Tensor, divergence: Tensor) -> Tensor:
    # A term of weight 0 is left out, since 0 times infinity would be NaN.
    total = torch.zeros_like(cross_entropy)
    if task.ce_weight:
        total = total + task.ce_weight * cross_entropy
    if task.teacher is not None and task.teacher.weight:
        total = total + task.teacher.weight * divergence
    return task.scale * total


def _charge(task: _Task, logits: Tensor, part: slice, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence of each row of `logits`, which are overwritten by the gradient if asked."""
    labels, teacher = task.labels[part], task.teacher
    of_teacher = None if teacher is None else _logits(teacher.hidden[part], teacher.head, task.compute)
    entropy, divergence = torch.zeros(2, logits.shape[0], dtype=logits.dtype, device=logits.device)
    rows = _tile_rows(logits)
    for start in range(0, logits.shape[0], rows):
        tile = slice(start, start + rows)
        raw = logits[tile]
        capped = task.student.softcap
        z = raw if capped is None and task.student.scale == 1 else task.student.finish(raw)
        normal = torch.logsumexp(z, dim=-1, keepdim=True)
        at_label = labels[tile].unsqueeze(1)
        entropy[tile] = (normal - z.gather(1, at_label)).squeeze(1)
        slope = None
        if teacher is not None and of_teacher is not None:
            of_student = z[:, : teacher.width]
            # At temperature 1 over all ids the normaliser is there already.
            same = teacher.temperature == 1 and teacher.width == z.shape[1]
            log_q = of_student - normal if same else _log_softmax(of_student / teacher.temperature)
            log_p = _log_softmax(teacher.head.finish(of_teacher[tile])[:, : teacher.width] / teacher.temperature)
            divergence[tile], slope = teacher.form(log_p, log_q)
        if gradient:
            _overwrite(task, raw, z, normal, at_label, slope)
    return entropy, divergence


def _overwrite(task: _Task, raw: Tensor, z: Tensor, normal: Tensor, at_label: Tensor, slope: Tensor | None) -> None:
    """Put the gradient with respect to the head's linear output into `raw`."""
    student, teacher = task.student, task.teacher
    # Chain rule through c tanh(s z / c): s (1 - (z/c)^2), of the value before it is overwritten.
    inner = None if student.softcap is None else 1 - (z / student.softcap) ** 2
    if task.ce_weight:
        torch.sub(z, normal, out=raw).exp_()
        raw.scatter_add_(1, at_label, torch.full_like(at_label, -1, dtype=raw.dtype))
        raw.mul_(task.ce_weight * task.scale * student.scale)
    else:
        raw.zero_()
    if teacher is not None and slope is not None and teacher.weight:
        raw[:, : teacher.width].add_(slope, alpha=teacher.weight / teacher.temperature * task.scale * student.scale)
    if inner is not None:
        raw.mul_(inner)


def _log_softmax(z: Tensor) -> Tensor:
    """In place."""
    return z.sub_(torch.logsumexp(z, dim=-1, keepdim=True))


def _logits(hidden: Tensor, head: Head, compute: torch.dtype, matrix: Tensor | None = None) -> Tensor:
    """The head's linear output, before scale and cap, in float32 or float64."""
    matrix = head.weight.detach().to(compute) if matrix is None else matrix
    rows = hidden.to(compute)
    if compute != torch.float32 and rows.is_cuda:
        # Accumulated in float32 anyway: rounding the result to half precision would be for nothing.
        raw = torch.mm(rows, matrix.t(), out_dtype=torch.float32)
    else:
        raw = at_least_float32(torch.mm(rows, matrix.t()))
    return raw if head.bias is None else raw.add_(head.bias.detach())


def _add_product(into: Tensor, slope: Tensor, rows: Tensor) -> None:
    if into.dtype == slope.dtype:
        into.addmm_(slope.t(), rows)
    elif slope.is_cuda:
        into += torch.mm(slope.t(), rows, out_dtype=torch.float32)
    else:
        into += slope.t() @ rows


def _gradient_buffer(parameter: Tensor, accumulate: bool) -> Tensor:
    if not accumulate:
        return torch.zeros_like(parameter)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _compute_type(hidden: Tensor, weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _chunk_tokens(weight: Tensor) -> int:
    if weight.is_cuda:
        # Two sides in float32.
        return max(64, _CHUNK_BYTES_CUDA // (8 * weight.shape[0]))
    return _CHUNK_TOKENS


def _tile_rows(logits: Tensor) -> int:
    if logits.is_cuda:
        return int(logits.shape[0]) or 1
    return max(1, _TILE_BYTES // (logits.element_size() * logits.shape[1]))
