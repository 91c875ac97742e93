"""TRL's experimental `GKDTrainer`: its installed `compute_loss` and `generalized_jsd_loss`, called as they are.

Favourable to it: samples padded on the right to the longest of the batch, the off-policy branch alone, and neither
its default gradient checkpointing nor the logging and hooks of a `Trainer`. Its forward KL is beta = 0. It mixes in
no cross-entropy and leaves the loss temperature at 1, so it has less to compute than we have.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from bench.rivals import IGNORED
from bench.rivals.optimizer_step import step_by_parts
from bench.rivals.published import Padded
from pocl.data.batches import EncodedSample
from pocl.models.precision import Precision

FORWARD_KL = 0.0


def gkd_trainer() -> Any:
    """The class, imported lazily: it takes seconds to import and belongs to an extra."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer


def gkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float, beta: float = FORWARD_KL
) -> Tensor:
    """Mean divergence over the labelled tokens, of logits `[B, L, V]` and shifted labels `[B, L]`."""
    loss: Tensor = gkd_trainer().generalized_jsd_loss(
        student_logits,
        teacher_logits,
        labels,
        beta=beta,
        temperature=temperature,
        num_items_in_batch=int((labels != IGNORED).sum()),
    )
    return loss


@dataclass(frozen=True)
class GKDStep:
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
        padded = Padded.collate(samples, length=None, device=self.student.device)
        # `compute_loss` shifts the labels itself.
        labels = padded.labels.roll(1, dims=1)
        labels[:, 0] = IGNORED
        inputs = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask, "labels": labels}
        trainer = gkd_trainer()
        # `compute_loss` reads nothing else of its trainer.
        stand_in = SimpleNamespace(
            teacher_model=self.teacher, beta=FORWARD_KL, generalized_jsd_loss=trainer.generalized_jsd_loss
        )
        tokens = sum(sample.predicted_tokens for sample in samples)
        with self.precision.autocast():
            loss: Tensor = trainer.compute_loss(stand_in, self.student, inputs, num_items_in_batch=tokens)
        return loss * share
