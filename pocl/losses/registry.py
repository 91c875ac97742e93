"""From a method of the specification to its divergence; total over :data:`pocl.spec.DistillationMethod`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import assert_never

from torch import Tensor

from pocl.losses import gradient as closed
from pocl.losses.divergence import (
    adaptive_kl,
    alpha_beta,
    forward_kl,
    js,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)
from pocl.spec import (
    JS,
    TVD,
    AdaptiveKL,
    AlphaBeta,
    DistillationMethod,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
)


@dataclass(frozen=True)
class Divergence:
    """One divergence in both of its forms, with its parameters bound."""

    value: Callable[[Tensor, Tensor], Tensor]
    """From log-probabilities of teacher and student, `[tokens, vocabulary]` each, to `[tokens]`; differentiable."""
    value_and_grad_: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """Value and closed-form gradient in place, as :mod:`pocl.losses.gradient` describes them."""


def divergence_of(method: DistillationMethod) -> Divergence:
    """The divergence of `method` with its parameters bound."""
    match method:
        case ForwardKL():
            return Divergence(forward_kl, closed.forward_kl)
        case ReverseKL():
            return Divergence(reverse_kl, closed.reverse_kl)
        case JS(beta=beta):
            return Divergence(partial(js, beta=beta), partial(closed.js, beta=beta))
        case TVD():
            return Divergence(tvd, closed.tvd)
        case SkewForwardKL(alpha=alpha):
            return Divergence(partial(skew_forward_kl, alpha=alpha), partial(closed.skew_forward_kl, alpha=alpha))
        case SkewReverseKL(alpha=alpha):
            return Divergence(partial(skew_reverse_kl, alpha=alpha), partial(closed.skew_reverse_kl, alpha=alpha))
        case AdaptiveKL(head_mass=mass):
            return Divergence(partial(adaptive_kl, head_mass=mass), partial(closed.adaptive_kl, head_mass=mass))
        case AlphaBeta(alpha=a, beta=b):
            return Divergence(partial(alpha_beta, alpha=a, beta=b), partial(closed.alpha_beta, alpha=a, beta=b))
        case _:
            assert_never(method)
