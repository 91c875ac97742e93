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
from pocl.models.packed import reason_not_to_pack
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
        self._longest_packed = 0
        self._shortest_padded: int | None = None
        self._reason: str | None = None
        """Why samples as long as that are padded."""

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Input of the output head at the positions that predict a response token, `[T, width]`."""
        if batch.packing is not None and self.reason_not_to_pack(batch.packing.max_length):
            # The batch is packed for a student that can be; this teacher cannot.
            batch = collate(batch.samples, device=batch.labels.device)
        with self.precision.autocast():
            return response_hidden_states(
                self.model, batch.input_ids, batch.attention_mask, batch.predicting, batch.packing
            )

    def reason_not_to_pack(self, max_length: int) -> str | None:
        """Why packed samples of up to `max_length` tokens are padded for this teacher; None where they are run as they
        are.

        The model is tried at the first call, and again for longer samples than before.
        """
        if max_length <= self._longest_packed:
            return None
        if self._shortest_padded is None or max_length < self._shortest_padded:
            reason = reason_not_to_pack(self.model, max_length, self.precision)
            if reason is None:
                self._longest_packed = max_length
                return None
            self._shortest_padded, self._reason = max_length, reason
        return self._reason


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
