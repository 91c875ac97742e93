"""Divergences of a token between teacher p and student q, as pure functions of log-probabilities.

Each takes log-probabilities `[tokens, vocabulary]` of teacher and student, float32 or float64, and gives `[tokens]` in
nats (total variation: a number from 0 to 1). All are true divergences: never negative, and zero if and only if p = q.
Temperature, label mask and weights are not applied here.

A log-probability of -inf, of a token that a model rules out, counts as `FLOOR`: a divergence that is infinite in theory
stays finite in value and gradient, and terms such as 0 log 0 are 0.
"""

import math

import torch
from torch import Tensor

FLOOR = -1e4
"""In nats: so far below zero that the exponential of it is exactly 0 in every float format."""


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = sum p (log p - log q) (Hinton et al. 2015, up to the teacher's entropy)."""
    return _kl(_floored(log_p), _floored(log_q))


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q‖p) = sum q (log q - log p) (MiniLLM, Gu et al. 2024, eq. 1)."""
    return _kl(_floored(log_q), _floored(log_p))


def js(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """beta KL(p‖m) + (1-beta) KL(q‖m), m = beta p + (1-beta) q, 0 < beta < 1 (GKD, Agarwal et al. 2024, eq. 1)."""
    log_p, log_q = _floored(log_p), _floored(log_q)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half the sum of |p - q|, in [0, 1]; where p = q the subgradient is 0 (f-distill, Wen et al. 2023)."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """KL(p ‖ alpha p + (1-alpha) q), 0 <= alpha < 1; alpha = 0 is forward KL (DistiLLM, Ko et al. 2024, eq. 3)."""
    log_p, log_q = _floored(log_p), _floored(log_q)
    return _kl(log_p, _log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """KL(q ‖ (1-alpha) p + alpha q), 0 <= alpha < 1; alpha = 0 is reverse KL (DistiLLM, Ko et al. 2024).

    The gradient flows through the student in the mixture as well.
    """
    log_p, log_q = _floored(log_p), _floored(log_q)
    return _kl(log_q, _log_mixture(log_q, log_p, alpha))


def adaptive_kl(log_p: Tensor, log_q: Tensor, *, head_mass: float) -> Tensor:
    """w KL(p‖q) + (1-w) KL(q‖p), w the head's share of the sum of |p - q|, 1/2 where p = q (AKL, Wu et al. 2024).

    The head is the tokens that the teacher finds likeliest, taken until their mass reaches `head_mass`; tokens
    of equal probability are taken together, so their order has no say. No gradient flows through w.
    """
    log_p, log_q = _floored(log_p), _floored(log_q)
    share = head_share(log_p.detach().exp(), log_q.detach().exp(), head_mass)
    return share * _kl(log_p, log_q) + (1 - share) * _kl(log_q, log_p)


def alpha_beta(log_p: Tensor, log_q: Tensor, *, alpha: float, beta: float) -> Tensor:
    """-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], a = alpha, b = beta (ABKD, Wang et al. 2025).

    The limits (Cichocki et al. 2011) have branches of their own; (1, 0) is forward KL and
    (0, 1) reverse KL. Where both are 0, log-probabilities below `FLOOR` count as `FLOOR`: they enter squared.
    """
    log_p, log_q = _floored(log_p), _floored(log_q)
    total = alpha + beta
    if alpha == beta == 0:
        return 0.5 * (log_p.clamp_min(FLOOR) - log_q.clamp_min(FLOOR)).square().sum(dim=-1)
    p, q = (total * log_p).exp(), (total * log_q).exp()
    if beta == 0:
        return _clamp_value(((p * (log_p - log_q)).sum(dim=-1) + (q - p).sum(dim=-1) / alpha) / alpha)
    if alpha == 0:
        return _clamp_value(((q * (log_q - log_p)).sum(dim=-1) + (p - q).sum(dim=-1) / beta) / beta)
    cross = (alpha * log_p + beta * log_q).exp()
    return _clamp_value((alpha / total * p + beta / total * q - cross).sum(dim=-1) / (alpha * beta))


def head_share(p: Tensor, q: Tensor, head_mass: float) -> Tensor:
    """The part of sum |p - q| on the head of p as :func:`adaptive_kl` defines it, `[tokens]`, from 0 to 1."""
    smallest = _smallest_of_head(p, head_mass)
    gap = (p - q).abs()
    head = gap.masked_fill(p < smallest, 0).sum(dim=-1)
    total = gap.sum(dim=-1)
    return torch.where(total > 0, (head / total).clamp_max(1), 0.5)


# Thirty halvings compiled into one function would take its compiler minutes.
@torch.compiler.disable  # type: ignore[untyped-decorator] # torch leaves it unannotated.
def _smallest_of_head(p: Tensor, head_mass: float) -> Tensor:
    """The smallest probability in the head, `[tokens, 1]`."""
    if p.device.type != "cpu":
        return smallest_of_head_by_bisection(p, head_mass)
    vocabulary = p.shape[-1]
    count = min(64, vocabulary)
    while True:
        largest = p.topk(count, dim=-1).values
        mass = largest.cumsum(dim=-1)
        # Most heads are small, and a sort of the whole vocabulary costs more than all the rest.
        if count == vocabulary or bool((mass[:, -1] >= head_mass).all()):
            break
        count = min(16 * count, vocabulary)
    last_of_head = (mass < head_mass).sum(dim=-1, keepdim=True).clamp_max(count - 1)
    return largest.gather(-1, last_of_head)


def smallest_of_head_by_bisection(p: Tensor, head_mass: float) -> Tensor:
    """The smallest probability in the head, `[tokens, 1]`, without a look at the numbers by the host.

    It is the largest probability whose equals and betters have the mass `head_mass` together. Floats that are not
    negative are in the order of their bits, so as many halvings as a float has bits find it exactly.
    """
    integer, bits = (torch.int64, 64) if p.dtype == torch.float64 else (torch.int32, 32)
    lower = torch.zeros(*p.shape[:-1], 1, dtype=integer, device=p.device)
    # Of the exponent's bits that of 2 has the first alone, in both formats.
    upper = torch.full_like(lower, 1 << (bits - 2))
    for _ in range(bits - 2):
        # Written so that the sum of both cannot overflow.
        middle = lower + (upper - lower) // 2
        mass = p.masked_fill(p < middle.view(p.dtype), 0).sum(dim=-1, keepdim=True)
        is_within_head = mass >= head_mass
        lower = torch.where(is_within_head, middle, lower)
        upper = torch.where(is_within_head, upper, middle)
    return lower.view(p.dtype)


def _floored(log_probabilities: Tensor) -> Tensor:
    return log_probabilities.masked_fill(log_probabilities == -math.inf, FLOOR)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return _clamp_value((log_a.exp() * (log_a - log_b)).sum(dim=-1))


def _clamp_value(value: Tensor) -> Tensor:
    # Rounding may leave a value just below zero. The value is clamped to 0, and the gradient stays as it is.
    return value + (-value.detach()).clamp_min(0)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight_of_a: float) -> Tensor:
    """log(w a + (1-w) b), from log-probabilities throughout, so that nothing underflows to log 0."""
    if weight_of_a == 0:
        return log_b
    return torch.logaddexp(log_a + math.log(weight_of_a), log_b + math.log1p(-weight_of_a))
