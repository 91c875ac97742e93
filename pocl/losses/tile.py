"""The elementwise part of the objective on a tile of tokens: losses, and their gradient in place of the logits.

A tile is as many tokens as stay in the processor's cache, so that the passes over it do not wait for memory. Every
function overwrites the logits that it is given, `[tokens, vocabulary]` in the format of the losses; labels are
`[tokens]`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pocl.losses.buffers import TileBuffers
from pocl.losses.divergence import FLOOR
from pocl.losses.registry import Divergence


@dataclass(frozen=True)
class TileTerms:
    """What the divergence of a token is made of."""

    divergence: Divergence
    temperature: float
    shared_width: int
    """How many ids the divergence is over."""


@dataclass(frozen=True)
class GradientFactors:
    """By how much the gradient of each term with regard to the logits enters that of the loss."""

    cross_entropy: float
    divergence: float
    """Tau squared included."""


def token_losses_(
    student: Tensor, teacher: Tensor, labels: Tensor, terms: TileTerms, buffers: TileBuffers
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence of each token, `[tokens]` each, in nats."""
    log_p, log_q, q = (buffer[: len(labels)] for buffer in (buffers.log_p, buffers.log_q, buffers.q))
    _centre(student[:, : terms.shared_width], terms.temperature, out=log_q)
    if _is_one_softmax(student, terms):
        _normalise_(log_q, probabilities=q)
        cross_entropy = _negative_log_likelihood(log_q, labels)
    else:
        _recentre_(student, log_q, terms)
        cross_entropy, _ = _cross_entropy_of_centred_(student, labels)
        _normalise_(log_q, probabilities=q)
    _centre(teacher[:, : terms.shared_width], terms.temperature, out=log_p)
    _normalise_(log_p, probabilities=teacher[:, : terms.shared_width])
    return cross_entropy, terms.divergence.value(log_p, log_q)


def token_losses_and_grad_(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    terms: TileTerms,
    factors: GradientFactors,
    buffers: TileBuffers,
) -> tuple[Tensor, Tensor]:
    """As :func:`token_losses_`; `student` then holds the gradient of the loss with regard to itself."""
    log_p, log_q, q = (buffer[: len(labels)] for buffer in (buffers.log_p, buffers.log_q, buffers.q))
    _centre(student[:, : terms.shared_width], terms.temperature, out=log_q)
    if _is_one_softmax(student, terms):
        _normalise_(log_q, probabilities=q)
        cross_entropy = _negative_log_likelihood(log_q, labels)
        if factors.cross_entropy != 0:
            _subtract_one_hot_(student.copy_(q).mul_(factors.cross_entropy), labels, factors.cross_entropy)
    else:
        _recentre_(student, log_q, terms)
        cross_entropy, total = _cross_entropy_of_centred_(student, labels)
        if factors.cross_entropy != 0:
            _subtract_one_hot_(student.mul_(factors.cross_entropy / total), labels, factors.cross_entropy)
        _normalise_(log_q, probabilities=q)
    p = teacher[:, : terms.shared_width]
    _centre(p, terms.temperature, out=log_p)
    _normalise_(log_p, probabilities=p)
    if factors.divergence == 0:
        if factors.cross_entropy == 0:
            student.zero_()
        return cross_entropy, terms.divergence.value(log_p, log_q)
    divergence, g = through_softmax_(terms.divergence, log_p, log_q, p, q)
    if factors.cross_entropy == 0:
        torch.mul(g, factors.divergence / terms.temperature, out=student[:, : terms.shared_width])
        student[:, terms.shared_width :].zero_()
    else:
        student[:, : terms.shared_width].add_(g, alpha=factors.divergence / terms.temperature)
    return cross_entropy, divergence


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token, `[tokens]`, in nats."""
    _centre(logits, 1, out=logits)
    cross_entropy, _ = _cross_entropy_of_centred_(logits, labels)
    return cross_entropy


def cross_entropy_and_grad_(logits: Tensor, labels: Tensor, factor: float) -> Tensor:
    """As :func:`cross_entropy_`; `logits` then hold `factor` times its gradient, softmax - one-hot."""
    _centre(logits, 1, out=logits)
    cross_entropy, total = _cross_entropy_of_centred_(logits, labels)
    if factor == 0:
        logits.zero_()
    else:
        _subtract_one_hot_(logits.mul_(factor / total), labels, factor)
    return cross_entropy


def _is_one_softmax(student: Tensor, terms: TileTerms) -> bool:
    """Whether one softmax of the student serves both terms: over the whole vocabulary at temperature 1."""
    return terms.shared_width == student.shape[1] and terms.temperature == 1


def _centre(logits: Tensor, temperature: float, *, out: Tensor) -> None:
    """logits / temperature, less the largest of its token, into `out`, which may be `logits`."""
    if temperature == 1:
        torch.sub(logits, logits.amax(dim=-1, keepdim=True), out=out)
    else:
        torch.mul(logits, 1 / temperature, out=out).sub_(out.amax(dim=-1, keepdim=True))


def _recentre_(student: Tensor, centred: Tensor, terms: TileTerms) -> None:
    """Centre `student` at temperature 1, from its logits `centred` at another temperature where those are all."""
    if terms.shared_width == student.shape[1]:
        torch.mul(centred, terms.temperature, out=student)
    else:
        _centre(student, 1, out=student)


def _normalise_(centred: Tensor, *, probabilities: Tensor) -> None:
    """Make `centred` its log-softmax, and `probabilities` its softmax: one exponential for both."""
    total = torch.exp(centred, out=probabilities).sum(dim=-1, keepdim=True)
    probabilities.div_(total)
    centred.sub_(total.log_())


def _negative_log_likelihood(log_q: Tensor, labels: Tensor) -> Tensor:
    return log_q.gather(1, labels.unsqueeze(1)).squeeze(1).neg_()


def _cross_entropy_of_centred_(centred: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy `[tokens]`, and the sum `[tokens, 1]` of the exponentials that `centred` then holds."""
    at_label = centred.gather(1, labels.unsqueeze(1)).squeeze(1)
    total = centred.exp_().sum(dim=-1, keepdim=True)
    return total.squeeze(1).log() - at_label, total


def _subtract_one_hot_(values: Tensor, labels: Tensor, factor: float) -> None:
    at_label = labels.unsqueeze(1)
    values.scatter_add_(1, at_label, values.new_full((1, 1), -factor).expand_as(at_label))


def through_softmax_(
    divergence: Divergence, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """D `[tokens]` and tau dD/dz = g - q sum(g), g = dD/d(log q); a token that q rules out has g = 0."""
    q_ruled_out = _ruled_out(log_q)
    for log_probabilities, ruled_out in ((log_q, q_ruled_out), (log_p, _ruled_out(log_p))):
        if ruled_out is not None:
            log_probabilities.masked_fill_(ruled_out, FLOOR)
    value, g = divergence.value_and_grad_(log_p, log_q, p, q)
    if q_ruled_out is not None:
        g.masked_fill_(q_ruled_out, 0)
    return value, g.addcmul_(q, g.sum(dim=-1, keepdim=True), value=-1)


def _ruled_out(log_probabilities: Tensor) -> Tensor | None:
    """Where a log-probability is -inf, `[tokens, vocabulary]`; None where none is known to be."""
    # Elsewhere than on the CPU the question would cost a wait for the device; compiled, the mask costs no pass.
    is_readable = log_probabilities.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_readable and bool(log_probabilities.amin() > -math.inf):
        return None
    return log_probabilities == -math.inf
