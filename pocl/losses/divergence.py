"""Pure per-token divergences between teacher p and student q.

Each takes log-probabilities `[tokens, vocabulary]` of teacher and student, float32 or float64, and gives
`[tokens]` in nats (total variation: a share of 1). All are true divergences: never negative, and zero if
and only if p = q. Nothing here knows temperature, masks or weights.

A log-probability of -inf, a token that a model rules out, counts as `FLOOR`: a divergence that is infinite
in theory stays finite in value and gradient, and terms such as 0 log 0 are 0.
"""

import math

import torch
from torch import Tensor

FLOOR = -1e4
"""Nats. Far below what any float can exponentiate, so such a token still has probability exactly 0."""


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = sum p (log p - log q) (Hinton et al. 2015, up to the teacher's entropy)."""
    return _kl(_finite(log_p), _finite(log_q))


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q‖p) = sum q (log q - log p) (MiniLLM, Gu et al. 2024, eq. 1)."""
    return _kl(_finite(log_q), _finite(log_p))


def js(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """beta KL(p‖m) + (1-beta) KL(q‖m), m = beta p + (1-beta) q, 0 < beta < 1 (GKD, Agarwal et al. 2024, eq. 1)."""
    log_p, log_q = _finite(log_p), _finite(log_q)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half the sum of |p - q|, in [0, 1]; where p = q the subgradient is 0 (f-distill, Wen et al. 2023)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """KL(p ‖ alpha p + (1-alpha) q), 0 <= alpha < 1; alpha = 0 is forward KL (DistiLLM, Ko et al. 2024, eq. 3)."""
    log_p, log_q = _finite(log_p), _finite(log_q)
    return _kl(log_p, _log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """KL(q ‖ (1-alpha) p + alpha q), 0 <= alpha < 1; alpha = 0 is reverse KL (DistiLLM, Ko et al. 2024).

    The gradient flows through the student in the mixture as well.
    """
    log_p, log_q = _finite(log_p), _finite(log_q)
    return _kl(log_q, _log_mixture(log_q, log_p, alpha))


def _finite(log_probabilities: Tensor) -> Tensor:
    return log_probabilities.masked_fill(log_probabilities == -math.inf, FLOOR)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    kl = (log_a.exp() * (log_a - log_b)).sum(dim=-1)
    # Rounding may leave a little less than zero. The value is lifted to 0; the gradient stays as it is.
    return kl + (-kl.detach()).clamp_min(0)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight_of_a: float) -> Tensor:
    """log(w a + (1-w) b), from log-probabilities throughout, so that nothing underflows to log 0."""
    if weight_of_a == 0:
        return log_b
    return torch.logaddexp(log_a + math.log(weight_of_a), log_b + math.log1p(-weight_of_a))
