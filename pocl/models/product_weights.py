"""Copies of weights in the format of the products, made once per optimiser step.

Under autocast every product rounds its fp32 weight anew. :class:`ProductWeights` rounds all of them together, and puts
the copies into the modules while the model runs. The fp32 weights (master weights) stay the model's parameters for
whoever looks outside :meth:`ProductWeights.in_use`: optimiser, checkpoints, digests and export.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pocl.models.output_head import Head
from pocl.models.precision import Precision

_FORWARDS = (nn.Linear.forward, Conv1D.forward)
"""Of the modules whose weight and bias enter one product and nothing else, so that autocast rounds both."""
_SUM_ELEMENTS = 1 << 23
"""Numbers of the fp32 buffer through which gradients are added, unless one gradient alone has more."""


@dataclass(frozen=True, eq=False)
class _Site:
    """Where a weight is read: one parameter of one module."""

    module: nn.Module
    name: str
    master: nn.Parameter
    copy: nn.Parameter


class ProductWeights:
    """One copy, in the format of the products, of every fp32 weight of a model that autocast would round.

    These are weights and biases of linear layers, GPT-2's `Conv1D` among them. Norms and the look-up of embeddings
    read the master weights; of a tied embedding, the output head reads a copy. Products with other weights, such as
    those of experts that are no linear layers, are rounded by autocast as before. In fp32 there are no copies.
    """

    def __init__(self, model: PreTrainedModel, precision: Precision) -> None:
        """Allocate the copies; they hold the weights from the first :meth:`refresh` on."""
        copies: dict[nn.Parameter, nn.Parameter] = {}
        self._sites: list[_Site] = []
        for module in model.modules() if precision.weights != torch.float32 else ():
            if type(module).forward not in _FORWARDS:
                continue
            for name, master in module.named_parameters(recurse=False):
                if master.dtype != torch.float32:
                    continue
                if master not in copies:
                    copy = torch.empty_like(master, dtype=precision.weights, requires_grad=False)
                    copies[master] = nn.Parameter(copy, requires_grad=master.requires_grad)
                self._sites.append(_Site(module, name, master, copies[master]))
        self._copies = copies
        self._is_in_use = False

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the master weights into the copies, all of them at once."""
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While the context lasts, the modules of the model read refreshed copies.

        Master weights must not change meanwhile. A context within another of the same object changes nothing. At the
        end the modules have the master weights again, and gradients that were not collected are dropped.
        """
        if self._is_in_use:
            yield
            return
        self.refresh()
        self._is_in_use = True
        try:
            # Set in the table itself: assigning to the module would look for the name in its tables first.
            for site in self._sites:
                site.module._parameters[site.name] = site.copy
            yield
        finally:
            for site in self._sites:
                site.module._parameters[site.name] = site.master
            for copy in self._copies.values():
                copy.grad = None
            self._is_in_use = False

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the gradients of the copies to those of the master weights, in fp32, and drop them.

        It follows each backward pass, so that the sum over micro-batches is in fp32. A weight without a gradient
        keeps none: an expert that no token chose is not to be decayed.
        """
        first: list[tuple[Tensor, Tensor]] = []
        later: list[tuple[Tensor, Tensor]] = []
        for master, copy in self._copies.items():
            if copy.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
                first.append((master.grad, copy.grad))
            else:
                later.append((master.grad, copy.grad))
            copy.grad = None
        if first:
            torch._foreach_copy_([total for total, _ in first], [gradient for _, gradient in first])
        if later:
            _add_(*zip(*later, strict=True))

    def with_copies(self, head: Head) -> Head:
        """`head` with the copies of its weight and bias, where there are some; outside :meth:`in_use`, `head`."""
        if not self._is_in_use:
            return head
        weight = self._copies.get(head.weight) if isinstance(head.weight, nn.Parameter) else None
        bias = self._copies.get(head.bias) if isinstance(head.bias, nn.Parameter) else None
        return replace(head, product_weight=weight, product_bias=bias)


def _add_(totals: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add `gradients` in the format of the products to `totals` in fp32.

    They pass through one fp32 buffer: a foreach sum of two formats would be a kernel for each tensor.
    """
    sizes = [gradient.numel() for gradient in gradients]
    buffer = torch.empty(max(_SUM_ELEMENTS, *sizes), dtype=torch.float32, device=totals[0].device)
    start = 0
    while start < len(sizes):
        stop, elements = start, 0
        while stop < len(sizes) and elements + sizes[stop] <= len(buffer):
            elements += sizes[stop]
            stop += 1
        views = buffer[:elements].split(sizes[start:stop])
        rounded = [view.view_as(total) for view, total in zip(views, totals[start:stop], strict=True)]
        torch._foreach_copy_(rounded, list(gradients[start:stop]))
        torch._foreach_add_(list(totals[start:stop]), rounded)
        start = stop
