"""The elementwise part of the objective on a few rows of logits: losses, and their gradient in place of the logits.

A tile is as many rows as stay in the processor's cache, so that the passes over it do not wait for memory.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pocl.losses.divergence import FLOOR
from pocl.losses.registry import Divergence

TokenLosses = tuple[Tensor, Tensor | None]
"""Cross-entropy and divergence, each `[rows]`; no divergence where no teacher is asked."""


@dataclass(frozen=True)
class Terms:
    """What a token is charged, and by how much each term enters the gradient."""

    distance: Divergence | None
    temperature: float
    width: int
    """How many ids the divergence is over."""
    cross_entropy: float
    """Factor of the gradient of cross-entropy with regard to the logits."""
    divergence: float
    """Factor of the gradient of the divergence, tau squared included."""


@dataclass
class Scratch:
    """Buffers by name, each made once and used again by every tile."""

    rows: int
    dtype: torch.dtype
    device: torch.device
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, rows: int, width: int) -> Tensor:
        """`[rows, width]`, contiguous, with whatever was in it before."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self.rows, width, dtype=self.dtype, device=self.device)
        return self._buffers[name][:rows]


def charge(
    student: Tensor, teacher: Tensor | None, labels: Tensor, terms: Terms, scratch: Scratch, *, gradient: bool
) -> TokenLosses:
    """Losses of each row; with `gradient`, `student` then holds the gradient with regard to itself.

    Both sides are overwritten in any case.

    Args:
        student: logits `[rows, V]` in the format that the losses are computed in.
        teacher: logits `[rows, its V]` alike, None where no teacher is asked.
        labels: `[rows]`, none of them ignored.
    """
    rows = student.shape[0]
    if teacher is None or terms.distance is None:
        cross_entropy = _cross_entropy(student, labels, terms.cross_entropy, gradient=gradient)
        return cross_entropy, None
    log_q, q = (scratch.take(name, rows, terms.width) for name in ("log_q", "q"))
    _log_softmax(student[:, : terms.width], terms.temperature, out=log_q, scaled=q)
    # At temperature 1 over the same vocabulary, one softmax serves both terms.
    shared = terms.temperature == 1 and terms.width == student.shape[1]
    if shared:
        cross_entropy = log_q.gather(1, labels.unsqueeze(1)).squeeze(1).neg_()
    else:
        cross_entropy = _cross_entropy(student, labels, terms.cross_entropy, gradient=gradient)
    log_p, p = scratch.take("log_p", rows, terms.width), teacher[:, : terms.width]
    _log_softmax(p, terms.temperature, out=log_p, scaled=p)
    if not gradient or terms.divergence == 0:
        divergence = terms.distance.value(log_p, log_q)
        if gradient and shared:
            _cross_entropy_gradient(torch.exp(log_q, out=student), labels, terms.cross_entropy)
        return cross_entropy, divergence

    torch.exp(log_q, out=q)
    if shared and terms.cross_entropy != 0:
        _cross_entropy_gradient(student.copy_(q), labels, terms.cross_entropy)
    divergence, g = _through_softmax(terms.distance, log_p, log_q, torch.exp(log_p, out=p), q)
    if terms.cross_entropy == 0:
        torch.mul(g, terms.divergence / terms.temperature, out=student[:, : terms.width])
        student[:, terms.width :].zero_()
    else:
        student[:, : terms.width].add_(g, alpha=terms.divergence / terms.temperature)
    return cross_entropy, divergence


def _log_softmax(logits: Tensor, temperature: float, *, out: Tensor, scaled: Tensor) -> None:
    """log softmax(logits / temperature) into `out`; `scaled`, which may be `logits`, is overwritten."""
    if temperature != 1:
        logits = torch.div(logits, temperature, out=scaled)
    torch.log_softmax(logits, dim=-1, out=out)


def _cross_entropy(logits: Tensor, labels: Tensor, factor: float, *, gradient: bool) -> Tensor:
    """Cross-entropy `[rows]`; `logits` become its gradient times `factor`, or nothing of use without `gradient`."""
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    at_label = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    total = logits.exp_().sum(dim=-1, keepdim=True)
    if gradient and factor != 0:
        _cross_entropy_gradient(logits.div_(total), labels, factor)
    return total.squeeze(1).log() - at_label


def _cross_entropy_gradient(probabilities: Tensor, labels: Tensor, factor: float) -> None:
    """(softmax - one-hot) times `factor`, in place."""
    at = labels.unsqueeze(1)
    probabilities.mul_(factor).scatter_add_(1, at, probabilities.new_full((1, 1), -factor).expand_as(at))


def _through_softmax(distance: Divergence, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """D `[rows]` and tau dD/dz = g - q sum(g), g = dD/d(log q); a token that q rules out has g = 0."""
    ruled_out = _ruled_out(log_q)
    for log_probabilities, mask in ((log_q, ruled_out), (log_p, _ruled_out(log_p))):
        if mask is not None:
            log_probabilities.masked_fill_(mask, FLOOR)
    divergence, g = distance.gradient(log_p, log_q, p, q)
    if ruled_out is not None:
        g.masked_fill_(ruled_out, 0)
    return divergence, g.addcmul_(q, g.sum(dim=-1, keepdim=True), value=-1)


def _ruled_out(log_probabilities: Tensor) -> Tensor | None:
    # Elsewhere than on the CPU the question would cost a wait for the device, and the mask costs little.
    if log_probabilities.device.type == "cpu" and bool(log_probabilities.amin() > -math.inf):
        return None
    return log_probabilities == -math.inf
