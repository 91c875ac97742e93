"""The teacher's output for a batch: one interface for a live and for a cached teacher."""

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.data.batches import Batch, collate
from pocl.models.heads import apply_head, response_hidden_states
from pocl.models.precision import Precision


class TeacherSignal(Protocol):
    """The teacher's final hidden states, and the head that turns them into logits."""

    model: PreTrainedModel
    """Has the output head; its layers may be absent."""
    precision: Precision

    def hidden(self, batch: Batch) -> Tensor:
        """Input of the output head at the positions that predict a response token, `[T, width]`, without gradient."""
        ...


class LiveTeacher:
    """A teacher whose layers run on every batch."""

    def __init__(self, model: PreTrainedModel, precision: Precision) -> None:
        self.model = model
        self.precision = precision

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Input of the output head at the positions that predict a response token, `[T, width]`."""
        if batch.lengths is not None:
            # The batch is packed for a student that was tried for it; the teacher was not.
            batch = collate(batch.samples, device=batch.labels.device)
        with self.precision.autocast():
            return response_hidden_states(self.model, batch.input_ids, batch.attention_mask, batch.predicts)


@torch.no_grad()
def teacher_logits(teacher: TeacherSignal, batch: Batch) -> Tensor:
    """The teacher's logits, `[T, vocabulary]` in fp32: its head applied to its hidden states."""
    with teacher.precision.autocast():
        return apply_head(teacher.model, teacher.hidden(batch)).float()
