"""The decoder layers of a model compiled one by one (regional compilation), for the passes of training.

All layers share one compiled function, so compiling takes as long as for one of them. CUDA graphs are recorded by
torch.compile too: it keeps their memory, replays forward and backward, and goes on without a graph for a shape that it
has not seen often.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
"""From a layer's forward to the compiled one."""


def layer_compiler(*, compiled: bool, graphs: bool, few_shapes: bool) -> Compile | None:
    """What compiles a layer: kernels joined by Inductor, CUDA graphs, both, or None for neither.

    With `few_shapes` each shape is compiled by itself; else one that changes becomes a variable of the kernels.
    """
    dynamic = False if few_shapes else None
    if compiled:
        return torch.compile(dynamic=dynamic, options={"triton.cudagraphs": True} if graphs else None)
    return torch.compile(dynamic=dynamic, backend="cudagraphs") if graphs else None


class CompiledLayers:
    """Layers with a compiled forward each, which they have while a context lasts."""

    def __init__(
        self, layers: Sequence[nn.Module] = (), compiler: Compile | None = None, *, graphs: bool = False
    ) -> None:
        """With None for `compiler` the layers stay as they are; `graphs` says whether it records CUDA graphs."""
        self._layers = () if compiler is None else tuple(layers)
        self._forwards = () if compiler is None else tuple(compiler(layer.forward) for layer in layers)
        self._graphs = graphs

    @property
    def are_compiled(self) -> bool:
        """Whether there are compiled layers."""
        return bool(self._layers)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While the context lasts, the layers run their compiled forward; generation and scoring run without."""
        for layer, forward in zip(self._layers, self._forwards, strict=True):
            layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.__dict__["forward"]

    def begin_micro_batch(self) -> None:
        """Say that the graphs' results of the micro-batch before are used no more, but for gradients."""
        if not self._graphs:
            return
        for layer in self._layers:
            for parameter in layer.parameters():
                if parameter.grad is not None:
                    # It may lie in the memory of a graph, which the next replay overwrites.
                    parameter.grad = parameter.grad.clone()
        torch.compiler.cudagraph_mark_step_begin()
