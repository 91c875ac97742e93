"""CUDA graphs of a step whose shapes and addresses repeat: one launch instead of thousands."""

from collections.abc import Callable, Hashable

import torch


class StepGraphs:
    """Graphs of one step, one for each of its shapes.

    The step must read and write the same tensors at each call, change them in place, and never wait for the device. Its
    first call with a shape runs as it is, which lets libraries allocate what they keep; the second is captured; from
    then on the capture is replayed.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, shape: Hashable, step: Callable[[], None]) -> None:
        """Run `step` once; equal shapes stand for equal steps."""
        if shape not in self._graphs:
            step()
            self._graphs[shape] = None
            return
        graph = self._graphs[shape]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # Graphs share memory, since they are replayed one after the other.
            with torch.cuda.graph(graph, pool=self._pool):
                step()
            self._graphs[shape] = graph
        graph.replay()
