"""The optimiser step that all rivals share: its micro-batches, backward passes, clipping and AdamW."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from pocl.data.batches import EncodedSample

PartLoss = Callable[[Sequence[EncodedSample], float], Tensor]
"""From the samples of a micro-batch and their share of the step's response tokens to their part of the step's loss."""


def step_by_parts(
    samples: Sequence[EncodedSample],
    loss_of: PartLoss,
    student: PreTrainedModel,
    optimizer: Optimizer,
    *,
    rows_at_once: int | None,
    max_grad_norm: float,
) -> float:
    """One optimiser step in micro-batches of `rows_at_once` samples, or in one; the loss."""
    rows, tokens = rows_at_once or len(samples), _response_tokens(samples)
    total = torch.zeros((), device=student.device)
    for start in range(0, len(samples), rows):
        part = samples[start : start + rows]
        loss = loss_of(part, _response_tokens(part) / tokens)
        torch.autograd.backward(loss)
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total.item()


def _response_tokens(samples: Sequence[EncodedSample]) -> int:
    return sum(sample.predicted_tokens for sample in samples)
