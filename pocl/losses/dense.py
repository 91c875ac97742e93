"""The training objective from full logits: the reference that :mod:`pocl.losses.fused` equals, and the way of models
whose output head is more than a scaled and capped linear map.

Logits are `[tokens, vocabulary]`, labels `[tokens]` and already shifted: the token that each position predicts, or
`IGNORED`. Softmax and divergence are computed in float32, or in float64 where the logits are.
"""

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from pocl.losses.objective import IGNORED, ObjectiveTerms
from pocl.losses.registry import Divergence, divergence_of
from pocl.losses.sums import ObjectiveSum, mix
from pocl.spec import KDMethod, Method

_METHOD: TypeAdapter[Method] = TypeAdapter(Method)


def objective_sum(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, terms: ObjectiveTerms
) -> ObjectiveSum:
    """The objective of :mod:`pocl.losses.objective`, summed over the tokens whose label is not `IGNORED`.

    No gradient flows to the teacher. Without a valid token the loss is 0 and its gradient zero.

    Raises:
        ValueError: for shapes or numbers that do not fit together.
    """
    terms.check()
    cross_entropy = cross_entropy_sum(student_logits, labels)
    width = _shared_width(student_logits, teacher_logits, terms)
    valid = labels != IGNORED
    teacher, student = teacher_logits.detach()[valid][:, :width], student_logits[valid][:, :width]
    divergence = _from_logits(divergence_of(terms.method), teacher, student, terms.temperature).sum()
    loss = mix(cross_entropy.loss, terms.tau_factor() * divergence, terms.kd_weight)
    return ObjectiveSum(loss, cross_entropy.cross_entropy, divergence.detach(), cross_entropy.tokens)


def cross_entropy_sum(student_logits: Tensor, labels: Tensor) -> ObjectiveSum:
    """Cross-entropy alone, summed over the tokens whose label is not `IGNORED`.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    if labels.shape != student_logits.shape[:1] or student_logits.dim() != 2:
        raise ValueError("student_logits must be [tokens, vocabulary] and labels [tokens]")
    valid = labels != IGNORED
    cross_entropy = F.cross_entropy(_at_least_float32(student_logits[valid]), labels[valid], reduction="sum")
    return ObjectiveSum(cross_entropy, cross_entropy.detach(), None, int(valid.sum()))


def token_losses(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, terms: ObjectiveTerms
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token in nats at temperature 1, and its divergence without tau squared, `[tokens]` each.

    Raises:
        ValueError: for shapes or numbers that do not fit together.
    """
    terms.check()
    width = _shared_width(student_logits, teacher_logits, terms)
    divergence = _from_logits(
        divergence_of(terms.method), teacher_logits[:, :width], student_logits[:, :width], terms.temperature
    )
    return token_cross_entropy(student_logits, labels), divergence


def token_cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, `[tokens]`, 0 where the label is `IGNORED`."""
    return F.cross_entropy(_at_least_float32(student_logits), labels, ignore_index=IGNORED, reduction="none")


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
    validated = _METHOD.validate_python({"name": method, **parameters})
    if not validated.needs_teacher:
        raise ValueError(f"{validated.name} has no divergence: it needs no teacher")
    ObjectiveTerms(validated, temperature, kd_weight=1.0, shared_vocabulary=None).check()
    if teacher_logits.shape != student_logits.shape or teacher_logits.dim() != 2:
        raise ValueError("teacher_logits and student_logits must both be [tokens, vocabulary]")
    return _from_logits(divergence_of(validated), teacher_logits, student_logits, temperature)


def _from_logits(divergence: Divergence, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    log_p, log_q = (torch.log_softmax(_at_least_float32(logits) / temperature, dim=-1) for logits in (teacher, student))
    return divergence.value(log_p, log_q)


def _shared_width(student_logits: Tensor, teacher_logits: Tensor, terms: ObjectiveTerms) -> int:
    if teacher_logits.dim() != 2 or teacher_logits.shape[0] != student_logits.shape[0]:
        raise ValueError("teacher_logits must be [tokens, vocabulary] with the student's tokens")
    return terms.shared_width(student_logits.shape[1], teacher_logits.shape[1])


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
