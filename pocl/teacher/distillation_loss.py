"""The loss of a student on a micro-batch: the one place that joins the models and the objective.

Heads that are a scaled and capped linear map are fused with the loss (:mod:`pocl.losses.fused`); of others full logits
are computed, micro-batch by micro-batch (:mod:`pocl.losses.dense`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.data.batches import Batch
from pocl.losses.buffers import LossExecution, Workspace
from pocl.losses.dense import cross_entropy_sum, objective_sum, token_cross_entropy, token_losses
from pocl.losses.fused import fused_objective_sum, fused_token_losses
from pocl.losses.fused_cross_entropy import fused_cross_entropy_sum, fused_token_cross_entropy
from pocl.losses.objective import ObjectiveTerms
from pocl.losses.sums import ObjectiveSum
from pocl.models.heads import response_hidden_states, response_logits
from pocl.models.output_head import Head, HeadInputs, extract_head
from pocl.models.precision import Precision
from pocl.models.product_weights import ProductWeights
from pocl.spec import DistillationMethod, Method
from pocl.teacher.signal import TeacherSignal, teacher_logits


class CrossEntropyLoss:
    """The cross-entropy of a student on the references, without a teacher."""

    def __init__(
        self,
        student: PreTrainedModel,
        precision: Precision,
        *,
        execution: LossExecution | None = None,
        product_weights: ProductWeights | None = None,
    ) -> None:
        """The cross-entropy of `student`.

        Args:
            execution: How the loss passes over the response tokens; on a CPU its buffers are kept.
            product_weights: Of the student; they are made here unless given.
        """
        self._student = _Student(student, precision, execution, product_weights)

    @property
    def product_weights(self) -> ProductWeights:
        """The copies of the student's weights that the products of a step read."""
        return self._student.product_weights

    @property
    def has_divergence(self) -> bool:
        """Whether the loss compares the student with a teacher."""
        return False

    @property
    def is_fused(self) -> bool:
        """Whether the head is fused with the loss."""
        return self._student.head is not None

    def teacher_states(self, batch: Batch) -> Tensor | None:
        """None: the loss takes no states of a teacher."""
        del batch
        return None

    def objective(
        self,
        batch: Batch,
        *,
        temperature: float,
        kd_weight: float,
        scale: float,
        teacher_states: Tensor | None = None,
    ) -> ObjectiveSum:
        """The cross-entropy of `batch` times `scale`, with the head's gradient accumulated into its `.grad`.

        It is all of the loss, at temperature 1, whatever the other arguments are.
        """
        del temperature, kd_weight, teacher_states
        if self._student.head is None:
            return cross_entropy_sum(self._student.logits(batch), batch.labels).scaled_by(scale)
        with self._student.autocast():
            return fused_cross_entropy_sum(
                self._student.head_inputs(batch, self._student.head),
                batch.labels,
                scale=scale,
                accumulate_into_grad=True,
                execution=self._student.execution,
            )

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """Cross-entropy of each response token with the student in eval mode, `[T]` nats."""
        with self._student.in_eval_mode():
            if self._student.head is None:
                return token_cross_entropy(self._student.logits(batch), batch.labels)
            with self._student.autocast():
                inputs = self._student.head_inputs(batch, self._student.head)
                return fused_token_cross_entropy(
                    inputs,
                    batch.labels,
                    execution=self._student.execution,
                )


class DistillationLoss:
    """The loss of a student against a teacher, mixed with cross-entropy on the references."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: TeacherSignal,
        method: DistillationMethod,
        *,
        shared_vocabulary: int | None,
        precision: Precision,
        execution: LossExecution | None = None,
        product_weights: ProductWeights | None = None,
    ) -> None:
        """Join a student and its teacher.

        Args:
            shared_vocabulary: How many ids mean the same to both; None where the vocabularies are equal.
            execution: How the loss passes over the response tokens; on a CPU its buffers are kept.
            product_weights: Of the student; they are made here unless given.
        """
        self._student = _Student(student, precision, execution, product_weights)
        self._teacher = teacher
        self._method = method
        self._shared_vocabulary = shared_vocabulary
        self._heads = _both(self._student.head, extract_head(teacher.model))

    @property
    def product_weights(self) -> ProductWeights:
        """The copies of the student's weights that the products of a step read."""
        return self._student.product_weights

    @property
    def has_divergence(self) -> bool:
        """Whether the loss compares the student with a teacher."""
        return True

    @property
    def is_fused(self) -> bool:
        """Whether both heads are fused with the loss."""
        return self._heads is not None

    def teacher_states(self, batch: Batch) -> Tensor | None:
        """The teacher's hidden states that :meth:`objective` takes, `[T, width]`; None where it takes logits."""
        return None if self._heads is None else self._teacher.hidden(batch)

    def objective(
        self,
        batch: Batch,
        *,
        temperature: float,
        kd_weight: float,
        scale: float,
        teacher_states: Tensor | None = None,
    ) -> ObjectiveSum:
        """The objective of `batch` times `scale`, with the head's gradient accumulated into its `.grad`.

        `teacher_states` are those of :meth:`teacher_states`, where they are there already.
        """
        terms = ObjectiveTerms(self._method, temperature, kd_weight, self._shared_vocabulary)
        if self._heads is None:
            student_logits = self._student.logits(batch)
            return objective_sum(student_logits, teacher_logits(self._teacher, batch), batch.labels, terms).scaled_by(
                scale
            )
        student_head, teacher_head = self._heads
        states = self._teacher.hidden(batch) if teacher_states is None else teacher_states
        teacher = HeadInputs(states, teacher_head)
        with self._student.autocast():
            return fused_objective_sum(
                self._student.head_inputs(batch, student_head),
                teacher,
                batch.labels,
                terms,
                scale=scale,
                accumulate_into_grad=True,
                execution=self._student.execution,
            )

    @torch.no_grad()
    def scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy and the method's divergence of each response token at temperature 1, with the student in eval
        mode: `[T]` nats each.
        """
        terms = ObjectiveTerms(self._method, 1.0, 1.0, self._shared_vocabulary)
        with self._student.in_eval_mode():
            if self._heads is None:
                student_logits = self._student.logits(batch)
                return token_losses(student_logits, teacher_logits(self._teacher, batch), batch.labels, terms)
            student_head, teacher_head = self._heads
            teacher = HeadInputs(self._teacher.hidden(batch), teacher_head)
            with self._student.autocast():
                student = self._student.head_inputs(batch, student_head)
                return fused_token_losses(
                    student,
                    teacher,
                    batch.labels,
                    terms,
                    execution=self._student.execution,
                )


TrainingLoss = CrossEntropyLoss | DistillationLoss


def training_loss(
    student: PreTrainedModel,
    teacher: TeacherSignal | None,
    method: Method,
    *,
    shared_vocabulary: int | None,
    precision: Precision,
    execution: LossExecution | None = None,
    product_weights: ProductWeights | None = None,
) -> TrainingLoss:
    """The loss that `method` trains with.

    Args:
        execution: How the loss passes over the response tokens; on a CPU its buffers are kept.
        shared_vocabulary: How many ids mean the same to both; None where the vocabularies are equal.
        product_weights: Of the student; they are made here unless given.

    Raises:
        ValueError: if the method needs a teacher and there is none.
    """
    if not method.needs_teacher:
        return CrossEntropyLoss(student, precision, execution=execution, product_weights=product_weights)
    if teacher is None:
        raise ValueError(f"{method.name} needs a teacher")
    return DistillationLoss(
        student,
        teacher,
        method,
        shared_vocabulary=shared_vocabulary,
        precision=precision,
        execution=execution,
        product_weights=product_weights,
    )


class _Student:
    """The student's side of a loss."""

    def __init__(
        self,
        model: PreTrainedModel,
        precision: Precision,
        execution: LossExecution | None,
        product_weights: ProductWeights | None,
    ) -> None:
        self._model = model
        self.autocast = precision.autocast
        self.product_weights = ProductWeights(model, precision) if product_weights is None else product_weights
        self.head = extract_head(model)
        # A GPU's allocator caches memory itself, and has better use for it between two losses.
        workspace = Workspace() if model.device.type == "cpu" else None
        self.execution = replace(execution or LossExecution(), workspace=workspace)

    def head_inputs(self, batch: Batch, head: Head) -> HeadInputs:
        """The hidden states at the positions that predict a response token, `[T, width]`, with the head."""
        hidden = response_hidden_states(
            self._model, batch.input_ids, batch.attention_mask, batch.predicting, batch.packing
        )
        return HeadInputs(hidden, self.product_weights.with_copies(head))

    def logits(self, batch: Batch) -> Tensor:
        """Logits at the positions that predict a response token, `[T, V]`."""
        with self.autocast():
            return response_logits(self._model, batch.input_ids, batch.attention_mask, batch.predicting)

    @contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """Without dropout while the context lasts."""
        was_training = self._model.training
        self._model.train(False)
        try:
            yield
        finally:
            self._model.train(was_training)


def _both(student: Head | None, teacher: Head | None) -> tuple[Head, Head] | None:
    return None if student is None or teacher is None else (student, teacher)
