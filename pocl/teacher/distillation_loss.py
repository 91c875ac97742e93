"""Student and teacher side by side: the one place that joins both models and the loss."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from pocl.data.batches import Batch
from pocl.losses import divergence
from pocl.losses.fused import fused_objective_sum, token_losses
from pocl.losses.objective import ObjectiveSum, objective_sum
from pocl.losses.tile import Workspace
from pocl.models.heads import response_hidden_states, response_logits
from pocl.models.output_head import extract_head
from pocl.models.precision import Precision
from pocl.spec import SFT, ForwardKL, Method
from pocl.teacher.signal import TeacherSignal, teacher_logits


class DistillationLoss:
    """Charges a student for batches, against a teacher or against the references alone.

    Heads that are plain arithmetic are fused with the loss; of others full logits are built, batch by batch.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: TeacherSignal | None,
        *,
        shared_vocabulary: int | None,
        precision: Precision,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._shared = shared_vocabulary
        self._precision = precision
        # A GPU's allocator keeps its memory itself, and has better use for it between two losses.
        self._workspace = Workspace() if student.device.type == "cpu" else None
        self._student_head = extract_head(student)
        self._teacher_head = None if teacher is None else extract_head(teacher.model)

    @property
    def is_fused(self) -> bool:
        """Whether both heads are plain arithmetic."""
        return self._student_head is not None and (self._teacher is None or self._teacher_head is not None)

    def objective(
        self, batch: Batch, *, method: Method, temperature: float, kd_weight: float, scale: float
    ) -> ObjectiveSum:
        """The training objective of a batch times `scale`, the head's gradient accumulated on the way."""
        teacher = None if isinstance(method, SFT) else self._teacher
        if self._student_head is None or not self.is_fused:
            return self._dense(batch, teacher, method, temperature, kd_weight).scaled_by(scale)
        of_teacher = None if teacher is None else teacher.hidden(batch)
        with self._precision.autocast():
            return fused_objective_sum(
                self._hidden(batch),
                self._student_head,
                of_teacher,
                self._teacher_head,
                batch.labels,
                method=method,
                temperature=temperature,
                kd_weight=kd_weight,
                shared_vocabulary=self._shared,
                scale=scale,
                accumulate_into_grad=True,
                workspace=self._workspace,
            )

    @torch.no_grad()
    def scores(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy and, with a teacher, forward KL at temperature 1, of the student in eval mode: `[T]` nats."""
        was_training = self._student.training
        self._student.train(False)
        try:
            return self._scores(batch)
        finally:
            self._student.train(was_training)

    def _scores(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        if self._student_head is None or not self.is_fused:
            return self._dense_scores(batch)
        of_teacher = None if self._teacher is None else self._teacher.hidden(batch)
        with self._precision.autocast():
            return token_losses(
                self._hidden(batch),
                self._student_head,
                of_teacher,
                self._teacher_head,
                batch.labels,
                method=SFT() if self._teacher is None else ForwardKL(),
                shared_vocabulary=self._shared,
                workspace=self._workspace,
            )

    def _hidden(self, batch: Batch) -> Tensor:
        return response_hidden_states(
            self._student, batch.input_ids, batch.attention_mask, batch.predicts, batch.lengths
        )

    def _dense(
        self, batch: Batch, teacher: TeacherSignal | None, method: Method, temperature: float, kd_weight: float
    ) -> ObjectiveSum:
        return objective_sum(
            self._logits(batch),
            None if teacher is None else teacher_logits(teacher, batch),
            batch.labels,
            method=method,
            temperature=temperature,
            kd_weight=kd_weight,
            shared_vocabulary=self._shared,
        )

    def _dense_scores(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        logits = self._logits(batch).float()
        cross_entropy = F.cross_entropy(logits, batch.labels, reduction="none")
        if self._teacher is None:
            return cross_entropy, None
        of_teacher = teacher_logits(self._teacher, batch)[:, : self._shared]
        return cross_entropy, divergence("forward_kl", of_teacher, logits[:, : self._shared])

    def _logits(self, batch: Batch) -> Tensor:
        with self._precision.autocast():
            return response_logits(self._student, batch.input_ids, batch.attention_mask, batch.predicts)
