"""The training objective: the only home of temperature, tau squared, label mask, CE mix and normalisation.

loss = (1 - w) CE + w s D(p, q), with p = softmax(teacher / tau), q = softmax(student / tau), w the KD weight
and s = tau^2 where the method asks for it (Hinton et al. 2015, section 2), else 1. CE is at temperature 1.

:func:`objective_sum` gives sums over tokens, never means, so that micro-batches of any size add up to the
same gradient. The loop divides once: it multiplies each sum by `normaliser(tokens)`, where `tokens` counts
the valid tokens of the whole optimiser step over all micro-batches and ranks.
"""

import math
from dataclasses import dataclass, replace

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from pocl.losses.registry import Divergence, divergence_of
from pocl.spec import SFT, KDMethod, Method

IGNORED = -100
"""The label of a position that is not trained on."""

_METHOD: TypeAdapter[Method] = TypeAdapter(Method)


@dataclass(frozen=True)
class ObjectiveSum:
    """Sums over the valid tokens of one micro-batch; each tensor is a scalar, float32 or float64."""

    loss: Tensor
    """To be multiplied by `normaliser` and differentiated."""
    cross_entropy: Tensor
    """Nats at temperature 1, detached."""
    divergence: Tensor | None
    """Without tau squared and weight, detached; None where the method asks no teacher."""
    tokens: int
    """Valid tokens that were summed over."""

    def scaled_by(self, scale: float) -> "ObjectiveSum":
        """The same with the loss, and so its gradient, multiplied."""
        return replace(self, loss=self.loss * scale)


def objective_sum(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    method: Method,
    temperature: float,
    kd_weight: float,
    shared_vocabulary: int | None,
) -> ObjectiveSum:
    """Sum the objective over the tokens whose label is not `IGNORED`.

    Softmax and divergence are computed in float32, or in float64 where the logits are. No gradient flows to
    the teacher. Without a valid token the loss is 0 and its gradient zero.

    Args:
        student_logits: `[tokens, student vocabulary]`.
        teacher_logits: `[tokens, teacher vocabulary]`; not read for `sft`, where it may be None.
        labels: `[tokens]`, already shifted: the token that each row predicts, or `IGNORED`.
        method: the divergence and its parameters; `sft` is cross-entropy alone, whatever `kd_weight` is.
        temperature: tau of teacher and student, above 0.
        kd_weight: w, from 0 to 1.
        shared_vocabulary: both heads are cut to this many ids before the softmax of the divergence; None
            where they are equally wide. Cross-entropy is over the student's whole vocabulary.

    Raises:
        ValueError: for shapes or numbers that do not fit together.
    """
    check_numbers(temperature, kd_weight)
    if labels.shape != student_logits.shape[:1] or student_logits.dim() != 2:
        raise ValueError("student_logits must be [tokens, vocabulary] and labels [tokens]")
    valid = labels != IGNORED
    student = _at_least_float32(student_logits[valid])
    tokens = student.shape[0]
    cross_entropy = F.cross_entropy(student, labels[valid], reduction="sum")
    distance = divergence_of(method)
    if distance is None or isinstance(method, SFT):
        return ObjectiveSum(cross_entropy, cross_entropy.detach(), None, tokens)

    if teacher_logits is None:
        raise ValueError(f"{method.name} needs teacher_logits")
    if teacher_logits.dim() != 2 or teacher_logits.shape[0] != student_logits.shape[0]:
        raise ValueError("teacher_logits must be [tokens, vocabulary] with the student's tokens")
    width = shared_width(student_logits.shape[1], teacher_logits.shape[1], shared_vocabulary)
    teacher = teacher_logits.detach()[valid]
    total = _divergence(distance, teacher[:, :width], student[:, :width], temperature).sum()
    loss = mix(cross_entropy, tau_squared(method, temperature) * total, kd_weight)
    return ObjectiveSum(loss, cross_entropy.detach(), total.detach(), tokens)


def tau_squared(method: Method, temperature: float) -> float:
    """What the divergence is multiplied by: tau squared where the method asks for it, else 1."""
    return 1.0 if isinstance(method, SFT) or not method.scale_by_tau_squared else temperature**2


def normaliser(tokens: int) -> float:
    """What to multiply every sum of an optimiser step by, given all its valid tokens: 1 / tokens, 0 for none."""
    return 1 / tokens if tokens else 0.0


def divergence(
    method: KDMethod | str,
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    temperature: float = 1.0,
    **parameters: float,
) -> Tensor:
    """The divergence of each token, from logits `[tokens, vocabulary]` to `[tokens]`, without tau squared.

    `parameters` are those of the method, such as `beta` of `js` or `alpha` of `skew_forward_kl`; what is not
    given has the default of the specification. Gradients flow to both sides.

    Raises:
        ValueError: for an unknown method, a parameter that it does not have or that is out of its range,
            `sft` (it has no divergence), or logits of unequal shape.
    """
    if "scale_by_tau_squared" in parameters:
        raise ValueError("a divergence carries no tau squared; multiply it yourself")
    check_numbers(temperature, 0.0)
    distance = divergence_of(_METHOD.validate_python({"name": method, **parameters}))
    if distance is None:
        raise ValueError("sft has no divergence: it asks no teacher")
    if teacher_logits.shape != student_logits.shape or teacher_logits.dim() != 2:
        raise ValueError("teacher_logits and student_logits must both be [tokens, vocabulary]")
    return _divergence(distance, teacher_logits, student_logits, temperature)


def _divergence(distance: Divergence, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    log_p, log_q = (torch.log_softmax(_at_least_float32(logits) / temperature, dim=-1) for logits in (teacher, student))
    return distance.value(log_p, log_q)


def mix(cross_entropy: Tensor, scaled_divergence: Tensor, kd_weight: float) -> Tensor:
    """(1-w) CE + w D, D already multiplied by tau squared where that is asked for."""
    # A term of weight 0 is left out, since 0 times an infinite cross-entropy would be NaN.
    if kd_weight == 0:
        return cross_entropy
    if kd_weight == 1:
        return scaled_divergence
    return (1 - kd_weight) * cross_entropy + kd_weight * scaled_divergence


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def shared_width(student: int, teacher: int, shared_vocabulary: int | None) -> int:
    """How many ids the divergence is over, given the sizes of both vocabularies.

    Raises:
        ValueError: if the sizes differ and nothing is said about it, or if there are not so many ids.
    """
    narrower = min(student, teacher)
    if shared_vocabulary is None:
        if student != teacher:
            raise ValueError("the vocabularies differ in size: give shared_vocabulary")
        return narrower
    if not 1 <= shared_vocabulary <= narrower:
        raise ValueError(f"shared_vocabulary must lie between 1 and {narrower}")
    return shared_vocabulary


def check_numbers(temperature: float, kd_weight: float) -> None:
    """Raises ValueError unless the temperature is above 0 and finite and the KD weight a share."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError("temperature must be finite and above 0")
    if not 0 <= kd_weight <= 1:
        raise ValueError("kd_weight must lie between 0 and 1")
