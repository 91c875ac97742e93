"""What the teacher says about a batch: one interface, whether it is run or remembered."""

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
    """Holds the head; it may be without its layers."""
    precision: Precision

    def hidden(self, batch: Batch) -> Tensor:
        """Input of the output head at the positions that predict a response token, `[T, width]`, no gradient."""
        ...


class LiveTeacher:
    """Runs the teacher on every batch."""

    def __init__(self, model: PreTrainedModel, precision: Precision) -> None:
        self.model = model
        self.precision = precision

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Input of the output head at the positions that predict a response token, `[T, width]`."""
        if batch.lengths is not None:
            # Packed for a student that can take it; whether the teacher can was never asked.
            batch = collate(batch.samples, device=batch.labels.device)
        with self.precision.autocast():
            return response_hidden_states(self.model, batch.input_ids, batch.attention_mask, batch.predicts)


@torch.no_grad()
def teacher_logits(teacher: TeacherSignal, batch: Batch) -> Tensor:
    """`[T, vocabulary]` in fp32: the head on the hidden states, exact for every temperature and method."""
    with teacher.precision.autocast():
        return apply_head(teacher.model, teacher.hidden(batch)).float()
