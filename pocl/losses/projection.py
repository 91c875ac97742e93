"""The products with an output head: logits of a chunk of tokens, and from their gradient that of all before them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pocl.losses.tile import Scratch, Workspace
from pocl.models.output_head import Head

_HALF = (torch.bfloat16, torch.float16)


def product_dtype(head: Head) -> torch.dtype:
    """The format of the products with `head`: that of autocast, as a linear layer has it, else its weight's."""
    weight = head.weight
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


class Projection:
    """A head in the format of its products, with one buffer for the logits of a chunk."""

    def __init__(self, head: Head, rows: int, workspace: Workspace, name: str) -> None:
        dtype = product_dtype(head)
        self.weight = head.weight.detach().to(dtype)
        self._head = head
        self._bias = None if head.bias is None else head.bias.detach().to(dtype)
        # CUDA gives the sums of a half-precision product unrounded.
        kept = torch.float32 if dtype in _HALF and self.weight.is_cuda else dtype
        self._logits = workspace.take(f"{name} logits", rows, len(self.weight), kept, self.weight.device)

    def linear(self, hidden: Tensor) -> Tensor:
        """W h + b, `[rows, V]`, in the buffer that the next chunk overwrites."""
        logits = self._logits[: len(hidden)]
        if logits.dtype != hidden.dtype:
            torch.mm(hidden, self.weight.T, out_dtype=logits.dtype, out=logits)
            return logits if self._bias is None else logits.add_(self._bias)
        if self._bias is None:
            return torch.mm(hidden, self.weight.T, out=logits)
        return torch.addmm(self._bias, hidden, self.weight.T, out=logits)

    def logits(self, linear: Tensor, scratch: Scratch, name: str) -> Tensor:
        """Scaled and capped logits of some rows of `linear` in the format of `scratch`, in place where that is its."""
        logits = linear
        if linear.dtype != scratch.dtype:
            logits = scratch.take(name, *linear.shape).copy_(linear)
        if self._head.scale != 1:
            logits.mul_(self._head.scale)
        if self._head.softcap is not None:
            logits.div_(self._head.softcap).tanh_().mul_(self._head.softcap)
        return logits

    def slope(self, logits: Tensor, scratch: Scratch) -> Tensor | None:
        """The derivative of the cap at its result `logits`, 1 - tanh^2; None without a cap."""
        cap = self._head.softcap
        if cap is None:
            return None
        slope = torch.div(logits, cap, out=scratch.take("slope", *logits.shape))
        return slope.square_().neg_().add_(1)


@dataclass
class HeadGradients:
    """Gradients of a loss with regard to what a head is given and what it has, summed up chunk by chunk."""

    hidden: Tensor | None
    """`[tokens, d]` in the format of the products; None, here and below, where no gradient is asked for."""
    weight: Tensor | None
    """`[V, d]`, at least float32."""
    bias: Tensor | None
    """`[V]`, at least float32."""
    into: Tensor | None
    """The parameter whose `.grad` gets the weight's gradient; None to leave that to backward."""
    weight_is_new: bool
    """Whether `weight` still has to be written for the first time."""

    @classmethod
    def wanted(cls, hidden: Tensor, head: Head, dtype: torch.dtype, *, into_grad: bool) -> "HeadGradients | None":
        """Zeros for each of `hidden` and the parameters of `head` that requires a gradient; None if none does.

        Raises:
            ValueError: with `into_grad` for a weight that is no leaf.
        """
        bias, weight = head.bias, head.weight
        needs_weight, needs_bias = weight.requires_grad, bias is not None and bias.requires_grad
        if not (hidden.requires_grad or needs_weight or needs_bias):
            return None
        into = weight if into_grad and needs_weight else None
        if into is not None and not into.is_leaf:
            raise ValueError("only a leaf has a .grad to accumulate into")
        in_place = into is not None and (into if into.grad is None else into.grad).dtype == dtype
        is_new = not in_place or weight.grad is None
        if into is not None and into.grad is None:
            into.grad = torch.empty_like(into) if in_place else torch.zeros_like(into)
        own = torch.empty_like(weight, dtype=dtype) if needs_weight and not in_place else None
        return cls(
            hidden=torch.zeros_like(hidden) if hidden.requires_grad else None,
            weight=into.grad if into is not None and in_place else own,
            bias=torch.zeros_like(bias, dtype=dtype) if bias is not None and needs_bias else None,
            into=into,
            weight_is_new=is_new,
        )

    def add(self, gradient: Tensor, hidden: Tensor, weight: Tensor, part: slice) -> None:
        """Take in the gradient `[rows, V]` with regard to W h + b of the tokens `part`."""
        if self.hidden is not None:
            torch.mm(gradient, weight, out=self.hidden[part])
        if self.bias is not None:
            self.bias.add_(gradient.sum(dim=0, dtype=self.bias.dtype))
        if self.weight is None:
            return
        if self.weight_is_new:
            self._write(gradient, hidden, self.weight)
            self.weight_is_new = False
        elif self.weight.dtype == gradient.dtype:
            self.weight.addmm_(gradient.T, hidden)
        elif gradient.is_cuda and gradient.dtype in _HALF:
            self.weight.add_(torch.mm(gradient.T, hidden, out_dtype=torch.float32))
        else:
            self.weight.add_(torch.mm(gradient.T, hidden))

    def _write(self, gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        # Spares a pass of zeros, and one that reads them.
        if weight.dtype == gradient.dtype:
            torch.mm(gradient.T, hidden, out=weight)
        elif gradient.is_cuda and gradient.dtype in _HALF:
            torch.mm(gradient.T, hidden, out_dtype=torch.float32, out=weight)
        else:
            weight.copy_(torch.mm(gradient.T, hidden))

    def finish(self) -> None:
        """After the last chunk: the weight's gradient goes to where it belongs."""
        if self.weight_is_new and self.weight is not None:
            self.weight.zero_()
        if self.into is None:
            return
        assert self.into.grad is not None  # Made in `wanted`.
        if self.weight is not self.into.grad and self.weight is not None:
            self.into.grad.add_(self.weight)
        self.weight = None

    def multiply(self, factor: Tensor) -> None:
        """All by the same factor, in place."""
        for gradient in (self.hidden, self.weight, self.bias):
            if gradient is not None:
                gradient.mul_(factor)
