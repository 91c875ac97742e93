"""The published POCL recipe (arXiv 2506.05695), reimplemented from its formulas.

Every sample is padded to 512 tokens; student and teacher run on each visit and give logits at all positions.
loss = (1 - w) CE + w tau^2 K, with K = -sum_v p log q, p = softmax(teacher / tau), q = softmax(student / tau):
the forward KL without the teacher's entropy, which has no gradient. CE and K are means over the response tokens
of the micro-batch; softmax is in fp32, and ids whose logit is -inf add nothing. Then the gradient is clipped to
norm 1 and AdamW steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import PreTrainedModel

from bench.rivals import IGNORED
from bench.rivals.optimizer_step import step_by_parts
from pocl.data.batches import EncodedSample, collate
from pocl.models.precision import Precision

PADDED_LENGTH = 512


@dataclass(frozen=True)
class Padded:
    """Samples padded to one length, with full label matrices."""

    input_ids: Tensor
    """`[B, L]`."""
    attention_mask: Tensor
    """`[B, L]`."""
    labels: Tensor
    """`[B, L]`, shifted: the token that a position predicts, or `IGNORED`."""

    @classmethod
    def collate(
        cls,
        samples: Sequence[EncodedSample],
        length: int | None = PADDED_LENGTH,
        device: torch.device | str = "cpu",
    ) -> "Padded":
        """Pad samples to `length`, or to the longest if it is None."""
        batch = collate(samples, length=length, device=torch.device(device))
        labels = torch.full_like(batch.input_ids, IGNORED)
        labels[batch.predicts] = batch.labels
        return cls(batch.input_ids, batch.attention_mask, labels)


def published_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float, kd_weight: float
) -> Tensor:
    """The scalar loss of logits `[B, L, V]` and shifted labels `[B, L]`."""
    vocabulary = student_logits.shape[-1]
    cross_entropy = F.cross_entropy(student_logits.float().view(-1, vocabulary), labels.view(-1), ignore_index=IGNORED)
    teacher = torch.softmax(teacher_logits / temperature, dim=-1, dtype=torch.float32)
    student = torch.log_softmax(student_logits / temperature, dim=-1, dtype=torch.float32)
    is_labelled = (labels != IGNORED).view(-1)
    # As usual for this loss, and as in ours, an id that the student rules out adds nothing rather than NaN.
    products = (teacher * student).masked_fill(torch.isinf(student_logits), 0)
    per_token = -products.sum(dim=-1).view(-1)
    distance = (per_token * is_labelled).sum() / is_labelled.sum()
    return (1 - kd_weight) * cross_entropy + kd_weight * temperature**2 * distance


@dataclass(frozen=True)
class PublishedStep:
    """One optimiser step over the samples of a batch."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    optimizer: Optimizer
    precision: Precision
    temperature: float
    kd_weight: float
    max_grad_norm: float = 1.0
    rows_at_once: int | None = None
    """Samples of a micro-batch; None for all of the step in one."""

    def __call__(self, samples: Sequence[EncodedSample]) -> float:
        return step_by_parts(
            samples,
            self._loss,
            self.student,
            self.optimizer,
            rows_at_once=self.rows_at_once,
            max_grad_norm=self.max_grad_norm,
        )

    def _loss(self, samples: Sequence[EncodedSample], share: float) -> Tensor:
        batch = Padded.collate(samples, device=self.student.device)
        with self.precision.autocast():
            with torch.no_grad():
                teacher = self._logits(self.teacher, batch)
            student = self._logits(self.student, batch)
        loss = published_loss(student, teacher, batch.labels, temperature=self.temperature, kd_weight=self.kd_weight)
        return loss * share

    @staticmethod
    def _logits(model: PreTrainedModel, batch: Padded) -> Tensor:
        logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return logits
