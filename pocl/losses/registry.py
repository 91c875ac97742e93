"""From a method of the specification to its divergence; total over :class:`pocl.spec.KDMethod`."""

from collections.abc import Callable
from functools import partial
from typing import assert_never

from torch import Tensor

from pocl.losses.divergence import forward_kl, js, reverse_kl, skew_forward_kl, skew_reverse_kl, tvd
from pocl.spec import JS, SFT, TVD, ForwardKL, Method, ReverseKL, SkewForwardKL, SkewReverseKL

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Log-probabilities of teacher and of student, each `[tokens, vocabulary]`, to `[tokens]`."""


def divergence_of(method: Method) -> Divergence | None:
    """The divergence of `method` with its parameters bound, or None where no teacher is asked (`sft`)."""
    match method:
        case SFT():
            return None
        case ForwardKL():
            return forward_kl
        case ReverseKL():
            return reverse_kl
        case JS(beta=beta):
            return partial(js, beta=beta)
        case TVD():
            return tvd
        case SkewForwardKL(alpha=alpha):
            return partial(skew_forward_kl, alpha=alpha)
        case SkewReverseKL(alpha=alpha):
            return partial(skew_reverse_kl, alpha=alpha)
        case _:
            assert_never(method)
