"""Each divergence with its gradient in closed form, for :mod:`pocl.losses.fused`.

Written for one tile of a few rows: in place where that is right, since on a CPU such work is bound by memory and not
by arithmetic. With g_i = dD / d log q_i the gradient with respect to the student's logits (over tau) is
g_i - q_i sum_j g_j, the softmax's own backward pass.

Values and the meaning of -inf are those of :mod:`pocl.losses.divergence`, which stays the reference.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import assert_never

import torch
from torch import Tensor

from pocl.losses.divergence import FLOOR
from pocl.spec import JS, SFT, TVD, ForwardKL, Method, ReverseKL, SkewForwardKL, SkewReverseKL

ClosedForm = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Log-probabilities of teacher and of student, `[rows, vocabulary]` each and both free to be overwritten, to the
divergence `[rows]` and its gradient with respect to the student's logits `[rows, vocabulary]`."""

_Core = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""log p, log q and q to the divergence and g."""


def closed_form_of(method: Method) -> ClosedForm | None:
    """Value and gradient of `method` with its parameters bound, or None where no teacher is asked (`sft`)."""
    match method:
        case SFT():
            return None
        case ForwardKL():
            return _forward_kl
        case ReverseKL():
            return partial(_finished, _reverse_kl)
        case JS(beta=beta):
            return partial(_finished, partial(_js, beta=beta))
        case TVD():
            return partial(_finished, _tvd)
        case SkewForwardKL(alpha=alpha):
            return partial(_finished, partial(_skew_forward_kl, alpha=alpha))
        case SkewReverseKL(alpha=alpha):
            return partial(_finished, partial(_skew_reverse_kl, alpha=alpha))
        case _:
            assert_never(method)


def _finished(core: _Core, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Rule out what a model rules out, ask `core`, and lead its gradient through the softmax."""
    ruled_out = _floor(log_p), _floor(log_q)
    q = log_q.exp()
    value, g = core(log_p, log_q, q)
    if ruled_out[1] is not None:
        # A constant took the place of these, so nothing flows to them.
        g.masked_fill_(ruled_out[1], 0)
    total = g.sum(dim=-1, keepdim=True)
    return value.clamp_min_(0), g.sub_(q.mul_(total))


def _floor(log_probabilities: Tensor) -> Tensor | None:
    """Put `FLOOR` in the place of -inf; where that was, or None if nowhere."""
    if log_probabilities.min() != -math.inf:
        return None
    ruled_out = log_probabilities == -math.inf
    log_probabilities.masked_fill_(ruled_out, FLOOR)
    return ruled_out


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    if log_q.min() == -math.inf:
        return _finished(_forward_kl_core, log_p, log_q)
    # The commonest method has the shortest form: its gradient is q - p.
    _floor(log_p)
    p = log_p.exp()
    value = torch.linalg.vecdot(p, log_p.sub_(log_q))
    return value.clamp_min_(0), log_q.exp_().sub_(p)


def _forward_kl_core(log_p: Tensor, log_q: Tensor, _q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    value = torch.linalg.vecdot(p, log_p.sub_(log_q))
    return value, p.neg_()


def _reverse_kl(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    # g = q (log q - log p + 1); the 1 goes, as sum q = 1 takes it out again.
    g = log_q.sub_(log_p).mul_(q)
    return g.sum(dim=-1), g


def _js(log_p: Tensor, log_q: Tensor, q: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, beta)
    p = log_p.exp()
    of_teacher = torch.linalg.vecdot(p, log_p.sub_(log_m)).clamp_min_(0)
    g = log_q.sub_(log_m).mul_(q)
    # The terms through m cancel: beta p + (1-beta) q = m.
    value = beta * of_teacher + (1 - beta) * g.sum(dim=-1).clamp_min_(0)
    return value, g.mul_(1 - beta)


def _tvd(log_p: Tensor, _log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    difference = q - log_p.exp_()
    value = 0.5 * difference.abs().sum(dim=-1)
    return value, difference.sign_().mul_(q).mul_(0.5)


def _skew_forward_kl(log_p: Tensor, log_q: Tensor, q: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    if alpha == 0:
        return _forward_kl_core(log_p, log_q, q)
    log_m = _log_mixture(log_p, log_q, alpha)
    p = log_p.exp()
    value = torch.linalg.vecdot(p, log_p.sub(log_m))
    # g = -(1-alpha) p q / m
    return value, log_q.add_(log_p).sub_(log_m).exp_().mul_(alpha - 1)


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, q: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    if alpha == 0:
        return _reverse_kl(log_p, log_q, q)
    log_m = _log_mixture(log_q, log_p, alpha)
    log_ratio = log_q.sub_(log_m)
    value = torch.linalg.vecdot(q, log_ratio)
    # g = q (log(q/m) + 1 - alpha q/m); the 1 goes, as above.
    return value, log_ratio.sub_(log_ratio.exp().mul_(alpha)).mul_(q)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight_of_a: float) -> Tensor:
    return torch.logaddexp(log_a + math.log(weight_of_a), log_b + math.log1p(-weight_of_a))
