"""The divergences of :mod:`pocl.losses.divergence` with their closed-form gradients.

Each function takes log-probabilities of teacher and student, `[tokens, vocabulary]` without -inf, and their
exponentials, and gives the divergence, `[tokens]`, and g = dD/d(log q), `[tokens, vocabulary]`, as if every log q were
an independent variable; :mod:`pocl.losses.tile` carries g through the softmax. To spare memory traffic the functions
work in place: of their arguments only q keeps its values, and g is in the memory of one of the others.
"""

import torch
from torch import Tensor

from pocl.losses.divergence import FLOOR, head_share

ValueAndGradient = tuple[Tensor, Tensor]


def forward_kl(log_p: Tensor, log_q: Tensor, p: Tensor, _q: Tensor) -> ValueAndGradient:
    """g = -p."""
    value = log_p.sub_(log_q).mul_(p).sum(dim=-1)
    return value.clamp_min_(0), p.neg_()


def reverse_kl(log_p: Tensor, log_q: Tensor, _p: Tensor, q: Tensor) -> ValueAndGradient:
    """g = q (log q - log p + 1)."""
    terms = log_q.sub_(log_p).mul_(q)
    value = terms.sum(dim=-1)
    return value.clamp_min_(0), terms.add_(q)


def js(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, *, beta: float) -> ValueAndGradient:
    """g = (1-beta) q log(q/m): the term q of the reverse KL cancels against the gradient through m."""
    log_m = _log_mixture(p, q, beta)
    teacher = log_p.sub_(log_m).mul_(p).sum(dim=-1)
    g = log_q.sub_(log_m).mul_(q)
    value = beta * teacher.clamp_min_(0) + (1 - beta) * g.sum(dim=-1).clamp_min_(0)
    return value, g.mul_(1 - beta)


def tvd(log_p: Tensor, _log_q: Tensor, p: Tensor, q: Tensor) -> ValueAndGradient:
    """g = sign(q - p) q / 2."""
    difference = torch.sub(q, p, out=p)
    value = torch.abs(difference, out=log_p).sum(dim=-1).mul_(0.5)
    return value, difference.sign_().mul_(q).mul_(0.5)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, *, alpha: float) -> ValueAndGradient:
    """g = -p (1-alpha) q/m, m = alpha p + (1-alpha) q."""
    if alpha == 0:
        return forward_kl(log_p, log_q, p, q)
    log_m = _log_mixture(p, q, alpha)
    value = log_p.sub_(log_m).mul_(p).sum(dim=-1)
    ratio = log_q.sub_(log_m).exp_()
    return value.clamp_min_(0), ratio.mul_(p).mul_(alpha - 1)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, *, alpha: float) -> ValueAndGradient:
    """g = q (log(q/m) + 1 - alpha q/m), m = (1-alpha) p + alpha q."""
    if alpha == 0:
        return reverse_kl(log_p, log_q, p, q)
    log_m = _log_mixture(q, p, alpha)
    log_ratio = log_q.sub_(log_m)
    factor = torch.exp(log_ratio, out=p).mul_(-alpha).add_(1).mul_(q)
    terms = log_ratio.mul_(q)
    value = terms.sum(dim=-1)
    return value.clamp_min_(0), terms.add_(factor)


def adaptive_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, *, head_mass: float) -> ValueAndGradient:
    """g = -w p + (1-w) q (log q - log p + 1), w the detached weight of the forward KL."""
    share = head_share(p, q, head_mass)
    log_ratio = log_q.sub_(log_p)
    forward = -torch.mul(log_ratio, p, out=log_p).sum(dim=-1)
    terms = log_ratio.mul_(q)
    value = share * forward.clamp_min_(0) + (1 - share) * terms.sum(dim=-1).clamp_min_(0)
    share = share.unsqueeze(-1)
    return value, terms.add_(q).mul_(1 - share).sub_(p.mul_(share))


def alpha_beta(log_p: Tensor, log_q: Tensor, p: Tensor, _q: Tensor, *, alpha: float, beta: float) -> ValueAndGradient:
    """g = (q^(a+b) - p^a q^b) / a, in the limit a = 0 q^b (log q - log p)."""
    if alpha == 0:
        return _alpha_zero(log_p, log_q, p, beta)
    total = alpha + beta
    if beta == 0:
        kl = torch.sub(log_p, log_q, out=p)
        p_total, q_total = log_p.mul_(total).exp_(), log_q.mul_(total).exp_()
        value = kl.mul_(p_total).sum(dim=-1)
        g = q_total.sub_(p_total).div_(alpha)
        return value.add_(g.sum(dim=-1)).div_(alpha).clamp_min_(0), g
    cross = torch.mul(log_p, alpha, out=p).add_(log_q, alpha=beta).exp_()
    p_total, q_total = log_p.mul_(total).exp_(), log_q.mul_(total).exp_()
    mean = p_total.mul_(alpha / total).add_(q_total, alpha=beta / total)
    value = mean.sub_(cross).sum(dim=-1).div_(alpha * beta)
    return value.clamp_min_(0), q_total.sub_(cross).div_(alpha)


def _alpha_zero(log_p: Tensor, log_q: Tensor, buffer: Tensor, beta: float) -> ValueAndGradient:
    if beta == 0:
        is_below_floor = log_q < FLOOR
        difference = log_q.clamp_min_(FLOOR).sub_(log_p.clamp_min_(FLOOR))
        value = torch.mul(difference, difference, out=buffer).sum(dim=-1).mul_(0.5)
        return value, difference.masked_fill_(is_below_floor, 0)
    log_ratio = torch.sub(log_q, log_p, out=buffer)
    p_beta, q_beta = log_p.mul_(beta).exp_(), log_q.mul_(beta).exp_()
    g = log_ratio.mul_(q_beta)
    rest = p_beta.sub_(q_beta).sum(dim=-1).div_(beta)
    return g.sum(dim=-1).add_(rest).div_(beta).clamp_min_(0), g


def _log_mixture(a: Tensor, b: Tensor, weight_of_a: float) -> Tensor:
    """log(w a + (1-w) b). Where both underflow the result is finite, and its terms vanish when multiplied by a or b."""
    mixture = torch.lerp(b, a, weight_of_a)
    return mixture.clamp_min_(torch.finfo(a.dtype).tiny).log_()
