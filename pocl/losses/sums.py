"""What a pass over the tokens of a micro-batch gives: the summed losses, joined to the autograd graph."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pocl.losses.buffers import GradientBuffers
from pocl.models.output_head import Head


@dataclass(frozen=True)
class ObjectiveSum:
    """Sums over the tokens of one micro-batch; each tensor is a scalar, float32 or float64."""

    loss: Tensor
    """The objective, to be differentiated."""
    cross_entropy: Tensor
    """Nats at temperature 1, detached, without weight and scale."""
    divergence: Tensor | None
    """Without tau squared, weight and scale, detached; None for cross-entropy alone."""

    def scaled_by(self, scale: float) -> "ObjectiveSum":
        """The same sums with the loss, and so its gradient, multiplied by `scale`."""
        return replace(self, loss=self.loss * scale)


def mix(cross_entropy: Tensor, scaled_divergence: Tensor, kd_weight: float) -> Tensor:
    """(1-w) CE + w s D, from CE and s D (:mod:`pocl.losses.objective`)."""
    # A term of weight 0 is left out, since 0 times an infinite cross-entropy would be NaN.
    if kd_weight == 0:
        return cross_entropy
    if kd_weight == 1:
        return scaled_divergence
    return (1 - kd_weight) * cross_entropy + kd_weight * scaled_divergence


def join_graph(loss: Tensor, gradients: GradientBuffers, hidden: Tensor, head: Head) -> Tensor:
    """`loss` as a node of the autograd graph whose gradients `gradients` are there already.

    Backward passes them on to `hidden` and to weight and bias of `head`, and can be run once.

    Raises:
        RuntimeError: in backward, when it is run twice, or when it starts from another gradient than 1 although the
            weight's gradient was accumulated in place.
    """
    # torch leaves `apply` without annotations.
    apply: Any = _PrecomputedGradients.apply
    joined: Tensor = apply(loss, gradients, hidden, head.weight, head.bias)
    return joined


class _PrecomputedGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: GradientBuffers, _hidden: Tensor, _weight: Tensor, _bias: Tensor | None
    ) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients: GradientBuffers | None = ctx.gradients
        if gradients is None:
            raise RuntimeError("the gradients of a fused objective can be had once")
        # With no reference left here, autograd keeps the very buffers as `.grad`.
        ctx.gradients = None
        if gradients.accumulates_into is not None:
            # Asserted on the device: to read the number would make the host wait for all that precedes it.
            message = "a weight's gradient that is in place already needs backward to start from 1: use scale"
            torch._assert_async(grad_output == 1, message)
        else:
            for gradient in (gradients.hidden, gradients.weight, gradients.bias):
                if gradient is not None:
                    gradient.mul_(grad_output)
        return None, None, gradients.hidden, gradients.weight, gradients.bias
