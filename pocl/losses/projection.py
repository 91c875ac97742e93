"""The products with an output head: the logits of a chunk of tokens."""

import torch
from torch import Tensor

from pocl.losses.buffers import HeadBuffers
from pocl.models.output_head import Head


class Projection:
    """An output head in the format of its products: logits = cap(scale (W h + b))."""

    def __init__(self, head: Head, dtype: torch.dtype, buffers: HeadBuffers) -> None:
        """`dtype` is that of the products, of the hidden states `h` too."""
        self.weight = _product_parameter(head.weight, head.product_weight, dtype)
        self._head = head
        self._bias = None if head.bias is None else _product_parameter(head.bias, head.product_bias, dtype)
        self._buffers = buffers

    def linear(self, hidden: Tensor) -> Tensor:
        """W h + b of a chunk, `[tokens, d]` -> `[tokens, V]`, in memory that the next chunk overwrites."""
        linear = self._buffers.linear[: len(hidden)]
        if linear.dtype != hidden.dtype:
            torch.mm(hidden, self.weight.T, out_dtype=linear.dtype, out=linear)
            return linear if self._bias is None else linear.add_(self._bias)
        if self._bias is None:
            return torch.mm(hidden, self.weight.T, out=linear)
        return torch.addmm(self._bias, hidden, self.weight.T, out=linear)

    def logits(self, linear: Tensor) -> Tensor:
        """Scaled and capped logits `[tokens, V]` of a tile in the format of the losses.

        They are in memory that the next tile overwrites, in `linear` itself where that has the format already.
        """
        logits = linear
        if self._buffers.logits is not None:
            logits = self._buffers.logits[: len(linear)].copy_(linear)
        if self._head.scale != 1:
            logits.mul_(self._head.scale)
        if self._head.softcap is not None:
            logits.div_(self._head.softcap).tanh_().mul_(self._head.softcap)
        return logits

    def cap_derivative(self, logits: Tensor) -> Tensor | None:
        """The derivative of the soft cap at its result `logits`, 1 - tanh^2, `[tokens, V]`; None without a cap."""
        cap, memory = self._head.softcap, self._buffers.cap_derivative
        if cap is None or memory is None:
            return None
        return torch.div(logits, cap, out=memory[: len(logits)]).square_().neg_().add_(1)


def _product_parameter(parameter: Tensor, copy: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The copy that is kept in the format of the products, else one made here."""
    return (parameter if copy is None else copy).detach().to(dtype)
