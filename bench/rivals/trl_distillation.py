"""TRL's `DistillationTrainer`: its installed chunked divergence, on the same fixed samples.

Favourable to it: the trainer itself takes no fixed samples, pads prompts and responses apart, and off Triton projects
the padding too. Here samples are padded to the longest of the batch and only response tokens reach the loss; there is
neither gradient checkpointing nor `empty_cache`. It mixes in no cross-entropy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from bench.rivals.optimizer_step import step_by_parts
from pocl.data.batches import Batch, EncodedSample, collate
from pocl.models.heads import output_head
from pocl.models.precision import Precision

FORWARD_KL = 0.0


def chunked_divergence() -> Any:
    """The function, imported lazily: it takes seconds to import and belongs to an extra."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    return _chunked_divergence_loss


def distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float,
    beta: float = FORWARD_KL,
) -> Tensor:
    """Mean divergence over the tokens of hidden states `[T, d]`, through heads `[V, d]`."""
    full_mask = torch.ones(1, student_hidden.shape[0], dtype=torch.long, device=student_hidden.device)
    loss, _entropy, _tokens = chunked_divergence()(
        student_hidden.unsqueeze(0),
        teacher_hidden.unsqueeze(0),
        student_head,
        teacher_head,
        full_mask,
        beta,
        temperature=temperature,
    )
    assert isinstance(loss, Tensor)  # The function is untyped.
    return loss


@dataclass(frozen=True)
class DistillationStep:
    """One optimiser step over the samples of a batch."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    optimizer: Optimizer
    precision: Precision
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
        batch = collate(samples, device=self.student.device)
        with self.precision.autocast():
            student = self._hidden(self.student, batch)
            with torch.no_grad():
                teacher = self._hidden(self.teacher, batch)
            loss = distillation_loss(
                student, teacher, self._head(self.student), self._head(self.teacher), temperature=1.0
            )
        return loss * share

    @staticmethod
    def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
        """The hidden states at the predicting positions, `[T, d]`."""
        hidden: Tensor = model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        return hidden[batch.predicts]

    @staticmethod
    def _head(model: PreTrainedModel) -> Tensor:
        return output_head(model).get_parameter("weight")
