"""The teacher's output for a batch: one interface for a live and for a cached teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.data.batches import Batch, collate
from pocl.models.digest import head_digest
from pocl.models.heads import apply_head, response_hidden_states, without_layers
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


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher comes from: nothing of it is loaded before it is asked for."""

    digest: str
    """Digest of the weights and the config."""
    structure: PreTrainedModel
    """The model with its config; its weights may have no memory (`meta` tensors)."""
    precision: Precision
    load: Callable[[], PreTrainedModel]
    """Gives the whole model, frozen and on its device."""
    head_only: Callable[[str], PreTrainedModel | None]
    """Gives the model without layers if its head has this digest (:func:`~pocl.models.digest.head_digest`); None in
    doubt."""

    @classmethod
    def loaded(cls, model: PreTrainedModel, digest: str, precision: Precision) -> "TeacherSource":
        """The source of a teacher that is in memory."""

        def head_only(expected: str) -> PreTrainedModel | None:
            return without_layers(model) if head_digest(model) == expected else None

        return cls(digest, model, precision, lambda: model, head_only)

    def live(self) -> LiveTeacher:
        """The teacher with its layers."""
        return LiveTeacher(self.load(), self.precision)


@torch.no_grad()
def teacher_logits(teacher: TeacherSignal, batch: Batch) -> Tensor:
    """The teacher's logits, `[T, vocabulary]` in fp32: its head applied to its hidden states."""
    with teacher.precision.autocast():
        return apply_head(teacher.model, teacher.hidden(batch)).float()
