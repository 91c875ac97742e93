"""The elementwise part of the objective on a few rows of logits: losses, and their gradient in place of the logits.

A tile is as many rows as stay in the processor's cache, so that the passes over it do not wait for memory.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pocl.losses.divergence import FLOOR
from pocl.losses.registry import Divergence

TokenLosses = tuple[Tensor, Tensor | None]
"""Cross-entropy and divergence, each `[rows]`; no divergence where no teacher is asked."""


@dataclass(frozen=True)
class LossTerms:
    """What a token is charged, and by how much each term enters the gradient."""

    distance: Divergence | None
    temperature: float
    width: int
    """How many ids the divergence is over."""
    cross_entropy: float
    """Factor of the gradient of cross-entropy with regard to the logits."""
    divergence: float
    """Factor of the gradient of the divergence, tau squared included."""


class Workspace:
    """Memory by name that is kept from one batch to the next, as large as was ever asked for.

    The system zeroes what it hands out anew, which costs a CPU as much time as a pass over it.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`[rows, width]`, contiguous, with whatever was in it before."""
        memory, needed = self._memory.get(name), rows * width
        if memory is None or memory.numel() < needed or memory.dtype != dtype or memory.device != device:
            # The old one goes first.
            self._memory.pop(name, None)
            memory = self._memory[name] = torch.empty(needed, dtype=dtype, device=device)
        return memory[:needed].view(rows, width)


@dataclass
class Scratch:
    """Buffers of a tile, each used again by the next."""

    rows: int
    dtype: torch.dtype
    device: torch.device
    workspace: Workspace

    def take(self, name: str, rows: int, width: int) -> Tensor:
        """`[rows, width]`, contiguous, with whatever was in it before."""
        return self.workspace.take(name, rows, width, self.dtype, self.device)


def token_losses_and_grad_(
    student: Tensor, teacher: Tensor | None, labels: Tensor, terms: LossTerms, scratch: Scratch, *, gradient: bool
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
    _centre(student[:, : terms.width], terms.temperature, out=log_q)
    whole = terms.width == student.shape[1]
    # One softmax then serves both terms.
    shared = whole and terms.temperature == 1
    if not whole:
        cross_entropy = _cross_entropy(student, labels, terms.cross_entropy, gradient=gradient)
    elif not shared:
        torch.mul(log_q, terms.temperature, out=student)
        cross_entropy = _cross_entropy_of_centred(student, labels, terms.cross_entropy, gradient=gradient)
    _normalise(log_q, probabilities=q)
    if shared:
        cross_entropy = log_q.gather(1, labels.unsqueeze(1)).squeeze(1).neg_()
    log_p, p = scratch.take("log_p", rows, terms.width), teacher[:, : terms.width]
    _centre(p, terms.temperature, out=log_p)
    _normalise(log_p, probabilities=p)
    if not gradient or terms.divergence == 0:
        divergence = terms.distance.value(log_p, log_q)
        if gradient and shared:
            _cross_entropy_gradient(student.copy_(q), labels, terms.cross_entropy)
        return cross_entropy, divergence
    if shared and terms.cross_entropy != 0:
        _cross_entropy_gradient(student.copy_(q), labels, terms.cross_entropy)
    divergence, g = _through_softmax(terms.distance, log_p, log_q, p, q)
    if terms.cross_entropy == 0:
        torch.mul(g, terms.divergence / terms.temperature, out=student[:, : terms.width])
        student[:, terms.width :].zero_()
    else:
        student[:, : terms.width].add_(g, alpha=terms.divergence / terms.temperature)
    return cross_entropy, divergence


def _centre(logits: Tensor, temperature: float, *, out: Tensor) -> None:
    """logits / temperature, less the largest of its row, into `out`, which may be `logits`."""
    if temperature == 1:
        torch.sub(logits, logits.amax(dim=-1, keepdim=True), out=out)
    else:
        torch.mul(logits, 1 / temperature, out=out).sub_(out.amax(dim=-1, keepdim=True))


def _normalise(centred: Tensor, *, probabilities: Tensor) -> None:
    """Make `centred` its log-softmax, and `probabilities` its softmax: one exponential for both."""
    total = torch.exp(centred, out=probabilities).sum(dim=-1, keepdim=True)
    probabilities.div_(total)
    centred.sub_(total.log_())


def _cross_entropy(logits: Tensor, labels: Tensor, factor: float, *, gradient: bool) -> Tensor:
    """Cross-entropy `[rows]`; `logits` become its gradient times `factor`, or nothing of use without `gradient`."""
    _centre(logits, 1, out=logits)
    return _cross_entropy_of_centred(logits, labels, factor, gradient=gradient)


def _cross_entropy_of_centred(centred: Tensor, labels: Tensor, factor: float, *, gradient: bool) -> Tensor:
    at_label = centred.gather(1, labels.unsqueeze(1)).squeeze(1)
    total = centred.exp_().sum(dim=-1, keepdim=True)
    if gradient and factor != 0:
        _add_at_labels(centred.mul_(factor / total), labels, -factor)
    return total.squeeze(1).log() - at_label


def _add_at_labels(values: Tensor, labels: Tensor, number: float) -> None:
    at = labels.unsqueeze(1)
    values.scatter_add_(1, at, values.new_full((1, 1), number).expand_as(at))


def _cross_entropy_gradient(probabilities: Tensor, labels: Tensor, factor: float) -> None:
    """(softmax - one-hot) times `factor`, in place."""
    _add_at_labels(probabilities.mul_(factor), labels, -factor)


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
