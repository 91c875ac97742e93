"""The elementwise part of the objective as one compiled function: few passes over the logits of a chunk.

torch.compile joins the functions below into reductions over the vocabulary and one write of the gradient, where
:mod:`pocl.losses.tile`, which this equals but for rounding, passes over the logits once in each of its functions. The
numbers that change from step to step and from stage to stage are tensors: nothing is compiled again for them.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pocl.losses.registry import divergence_of
from pocl.losses.tile import GradientFactors, TileTerms, through_softmax_
from pocl.models.output_head import Head
from pocl.spec import DistillationMethod

CompiledTile = Callable[[Tensor, Tensor, Tensor, "Numbers"], tuple[Tensor, Tensor, Tensor]]
"""From W h + b of student and teacher, `[tokens, V]` each, and labels `[tokens]` to cross-entropy and divergence,
`[tokens]` each, and the gradient of the loss with regard to W h + b of the student in the format of its products."""


class Numbers(NamedTuple):
    """The numbers of a step, each a tensor without dimensions in the format of the losses."""

    inverse_temperature: Tensor
    cross_entropy_factor: Tensor
    """Of the gradient."""
    divergence_factor: Tensor
    """Of the gradient with regard to the student's logits over temperature."""

    @classmethod
    def of(cls, terms: TileTerms, factors: GradientFactors, dtype: torch.dtype, device: torch.device) -> "Numbers":
        """The numbers on `device`, written there by kernels: a copy from the host would wait."""
        numbers = (1 / terms.temperature, factors.cross_entropy, factors.divergence / terms.temperature)
        return cls(*(torch.full((), number, dtype=dtype, device=device) for number in numbers))


class HeadShape(NamedTuple):
    """What follows the product of an output head."""

    scale: float
    softcap: float | None

    @classmethod
    def of(cls, head: Head) -> "HeadShape":
        return cls(head.scale, head.softcap)


class Formats(NamedTuple):
    """The formats of the losses, and of the gradient that the products are given."""

    losses: torch.dtype
    gradient: torch.dtype


@lru_cache(maxsize=64)
def compiled_tile(
    method: DistillationMethod,
    shared_width: int,
    student: HeadShape,
    teacher: HeadShape,
    formats: Formats,
    backend: str | Callable[..., Any],
) -> CompiledTile:
    """The losses and the gradient of a tile, compiled by `backend` at the first call, and again for other widths."""
    divergence = divergence_of(method)

    def losses_and_gradient(
        linear: Tensor, teacher_linear: Tensor, labels: Tensor, numbers: Numbers
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, derivative = _logits(linear.to(formats.losses), student)
        log_likelihood = torch.log_softmax(logits, dim=-1)
        cross_entropy = -log_likelihood.gather(1, labels.unsqueeze(1)).squeeze(1)
        log_q = torch.log_softmax(logits[:, :shared_width] * numbers.inverse_temperature, dim=-1)
        teacher_logits, _ = _logits(teacher_linear[:, :shared_width].to(formats.losses), teacher)
        log_p = torch.log_softmax(teacher_logits * numbers.inverse_temperature, dim=-1)
        value, g = through_softmax_(divergence, log_p, log_q, log_p.exp(), log_q.exp())
        is_label = torch.arange(linear.shape[1], device=linear.device) == labels.unsqueeze(1)
        gradient = (log_likelihood.exp() - is_label.to(formats.losses)) * numbers.cross_entropy_factor
        beyond = gradient.shape[1] - shared_width
        gradient = gradient + torch.nn.functional.pad(g * numbers.divergence_factor, (0, beyond))
        if derivative is not None:
            gradient = gradient * derivative
        return cross_entropy, value, gradient.to(formats.gradient)

    compiled = torch.compile(losses_and_gradient, backend=backend)

    def run(linear: Tensor, teacher_linear: Tensor, labels: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor, Tensor]:
        for tensor in (linear, teacher_linear, labels):
            # Each chunk may have another number of tokens.
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        result: tuple[Tensor, Tensor, Tensor] = compiled(linear, teacher_linear, labels, numbers)
        return result

    return run


def _logits(linear: Tensor, head: HeadShape) -> tuple[Tensor, Tensor | None]:
    """The scaled and capped logits, and the derivative of the cap, None without one."""
    logits = linear if head.scale == 1 else linear * head.scale
    if head.softcap is None:
        return logits, None
    capped = torch.tanh(logits / head.softcap)
    return head.softcap * capped, 1 - capped * capped
