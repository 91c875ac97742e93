"""What the teacher says about a batch: one interface, whether it is run or remembered."""

import hashlib
from typing import Protocol

import torch
from transformers import PreTrainedModel

from pocl.data.batches import Batch
from pocl.models.heads import apply_head, head_inputs
from pocl.models.precision import Precision


class TeacherSignal(Protocol):
    """Logits of the teacher at the positions that predict a response token."""

    def logits(self, batch: Batch) -> torch.Tensor:
        """`[tokens, vocabulary]` in fp32, without gradient."""
        ...


class LiveTeacher:
    """Runs the teacher on every batch."""

    def __init__(self, model: PreTrainedModel, precision: Precision) -> None:
        self._model = model
        self._precision = precision

    def logits(self, batch: Batch) -> torch.Tensor:
        return self.from_hidden(self.hidden(batch))

    @torch.no_grad()
    def hidden(self, batch: Batch) -> torch.Tensor:
        """Input of the output head at the predicting positions, `[tokens, width]`."""
        with self._precision.autocast():
            return head_inputs(self._model, batch.input_ids, batch.attention_mask, batch.predicts)

    @torch.no_grad()
    def from_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head alone: exact for every temperature and method, since both act on its output."""
        with self._precision.autocast():
            return apply_head(self._model, hidden).float()


class RememberedTeacher:
    """Runs the teacher once for each distinct batch and keeps its hidden states, up to a number of bytes.

    Made for batches whose composition never changes, such as those of the validation rows.
    """

    def __init__(self, teacher: LiveTeacher, *, max_bytes: int = 1 << 30) -> None:
        self._teacher = teacher
        self._max_bytes = max_bytes
        self._bytes = 0
        self._hidden: dict[bytes, torch.Tensor] = {}

    def logits(self, batch: Batch) -> torch.Tensor:
        key = _key(batch)
        hidden = self._hidden.get(key)
        if hidden is None:
            hidden = self._teacher.hidden(batch)
            self._remember(key, hidden)
        return self._teacher.from_hidden(hidden.to(batch.input_ids.device))

    def _remember(self, key: bytes, hidden: torch.Tensor) -> None:
        size = hidden.numel() * hidden.element_size()
        if self._bytes + size > self._max_bytes:
            return
        self._hidden[key] = hidden.cpu()
        self._bytes += size


def _key(batch: Batch) -> bytes:
    digest = hashlib.sha256(str(tuple(batch.input_ids.shape)).encode())
    digest.update(batch.input_ids.cpu().numpy().tobytes())
    digest.update(batch.predicts.cpu().numpy().tobytes())
    return digest.digest()
