"""The training objective from full logits: the reference that :mod:`pocl.losses.fused` equals, and the way of models
whose output head is more than a scaled and capped linear map.

Logits are `[tokens, vocabulary]`, labels `[tokens]` and already shifted: the token that each position predicts. Every
token counts. Softmax and divergence are computed in float32, or in float64 where the logits are.
"""

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from pocl.losses.objective import ObjectiveTerms
from pocl.losses.registry import divergence_of
from pocl.losses.sums import ObjectiveSum, mix
from pocl.spec import KDMethod, Method

_METHOD: TypeAdapter[Method] = TypeAdapter(Method)


def objective_sum(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, terms: ObjectiveTerms
) -> ObjectiveSum:
    """The objective of :mod:`pocl.losses.objective`, summed over the tokens.

    No gradient flows to the teacher. Without a token the loss is 0.

    Raises:
        ValueError: for shapes or numbers that do not fit together.
    """
    _check_shapes(student_logits, labels, teacher_logits)
    student, teacher = _at_least_float32(student_logits), _at_least_float32(teacher_logits.detach())
    terms.check()
    width, tau_factor = terms.shared_width(student.shape[1], teacher.shape[1]), terms.tau_factor()
    log_p = torch.log_softmax(teacher[:, :width] / terms.temperature, dim=-1)
    log_q = torch.log_softmax(student[:, :width] / terms.temperature, dim=-1)
    divergence = divergence_of(terms.method).value(log_p, log_q).sum()
    cross_entropy = F.cross_entropy(student, labels, reduction="sum")
    loss = mix(cross_entropy, tau_factor * divergence, terms.kd_weight)
    return ObjectiveSum(loss, cross_entropy.detach(), divergence.detach())


def cross_entropy_sum(student_logits: Tensor, labels: Tensor) -> ObjectiveSum:
    """Cross-entropy alone, summed over the tokens.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    _check_shapes(student_logits, labels)
    cross_entropy = F.cross_entropy(_at_least_float32(student_logits), labels, reduction="sum")
    return ObjectiveSum(cross_entropy, cross_entropy.detach(), None)


def token_losses(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, terms: ObjectiveTerms
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token in nats at temperature 1, and its divergence without tau squared, `[tokens]` each.

    Raises:
        ValueError: for shapes or numbers that do not fit together.
    """
    _check_shapes(student_logits, labels, teacher_logits)
    cross_entropy = token_cross_entropy(student_logits, labels)
    student, teacher = _at_least_float32(student_logits), _at_least_float32(teacher_logits)
    terms.check()
    width = terms.shared_width(student.shape[1], teacher.shape[1])
    log_p = torch.log_softmax(teacher[:, :width] / terms.temperature, dim=-1)
    log_q = torch.log_softmax(student[:, :width] / terms.temperature, dim=-1)
    return cross_entropy, divergence_of(terms.method).value(log_p, log_q)


def token_cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, `[tokens]`."""
    return F.cross_entropy(_at_least_float32(student_logits), labels, reduction="none")


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
    log_p = torch.log_softmax(_at_least_float32(teacher_logits) / temperature, dim=-1)
    log_q = torch.log_softmax(_at_least_float32(student_logits) / temperature, dim=-1)
    return divergence_of(validated).value(log_p, log_q)


def _check_shapes(student_logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> None:
    if labels.shape != student_logits.shape[:1] or student_logits.dim() != 2:
        raise ValueError("student_logits must be [tokens, vocabulary] and labels [tokens]")
    if teacher_logits is not None and (teacher_logits.dim() != 2 or len(teacher_logits) != len(student_logits)):
        raise ValueError("teacher_logits must be [tokens, vocabulary] with the student's tokens")


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
