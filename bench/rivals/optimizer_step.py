"""The optimiser step that all rivals share."""

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel


def backward_and_step(loss: Tensor, student: PreTrainedModel, optimizer: Optimizer, max_grad_norm: float) -> float:
    """Backward pass, gradient clipping and optimiser step; the loss."""
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()
