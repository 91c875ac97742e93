"""The products back through an output head: from the gradient of logits to those of hidden states and parameters."""

import torch
from torch import Tensor

from pocl.losses.buffers import HALF, GradientBuffers


def uncap_gradient(gradient: Tensor, cap_derivative: Tensor | None, *, out: Tensor) -> None:
    """From the gradient of capped logits to that of the linear ones, `[tokens, V]`, in the format of the products."""
    if cap_derivative is not None:
        gradient.mul_(cap_derivative)
    if gradient.data_ptr() != out.data_ptr():
        out.copy_(gradient)


def add_chunk(
    gradients: GradientBuffers, linear_gradient: Tensor, hidden: Tensor, weight: Tensor, chunk: slice
) -> None:
    """Add what the tokens `chunk` contribute: dH = G W, dW = G^T H, db = the sum of G over tokens.

    Args:
        linear_gradient: G, the gradient with regard to W h + b, `[tokens, V]`.
        hidden: H, `[tokens, d]`.
        weight: W, `[V, d]`; all three are in the format of the products.
    """
    if gradients.hidden is not None:
        torch.mm(linear_gradient, weight, out=gradients.hidden[chunk])
    if gradients.bias is not None:
        gradients.bias.add_(linear_gradient.sum(dim=0, dtype=gradients.bias.dtype))
    if gradients.weight is None:
        return
    if gradients.is_weight_unwritten:
        _write_weight_gradient(linear_gradient, hidden, out=gradients.weight)
        gradients.is_weight_unwritten = False
    elif gradients.weight.dtype == linear_gradient.dtype:
        gradients.weight.addmm_(linear_gradient.T, hidden)
    elif linear_gradient.is_cuda and linear_gradient.dtype in HALF:
        gradients.weight.add_(torch.mm(linear_gradient.T, hidden, out_dtype=torch.float32))
    else:
        gradients.weight.add_(torch.mm(linear_gradient.T, hidden))


def finish(gradients: GradientBuffers) -> None:
    """After the last chunk: the weight's gradient goes to the parameter's `.grad` where it is accumulated in place."""
    if gradients.is_weight_unwritten and gradients.weight is not None:
        gradients.weight.zero_()
    if gradients.accumulates_into is None:
        return
    grad = gradients.accumulates_into.grad
    assert grad is not None  # Allocated with the buffers.
    if gradients.weight is not grad and gradients.weight is not None:
        grad.add_(gradients.weight)
    gradients.weight = None


def _write_weight_gradient(linear_gradient: Tensor, hidden: Tensor, *, out: Tensor) -> None:
    # Overwriting spares a pass of zeros, and one that reads them.
    if out.dtype == linear_gradient.dtype:
        torch.mm(linear_gradient.T, hidden, out=out)
    elif linear_gradient.is_cuda and linear_gradient.dtype in HALF:
        torch.mm(linear_gradient.T, hidden, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(linear_gradient.T, hidden))
