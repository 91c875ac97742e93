"""Counts of what work asks of the dispatcher and of the host, which predict on a CPU what a GPU waits for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_HOST_READS = {"tolist", "item", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"}


def count_operators(work: Callable[[], object]) -> int:
    """The number of operators that `work` dispatches; on a GPU each launches a kernel or more, unless it is a view."""
    counter = _Operators()
    with counter:
        work()
    return counter.count


def count_host_reads(work: Callable[[], object]) -> int:
    """How often `work` reads a tensor on the host; on a GPU each read waits for the device."""
    counter = _HostReads()
    with counter:
        work()
    return counter.count


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated.
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class _HostReads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += func.__name__ in _HOST_READS and isinstance(args[0], torch.Tensor)
        return func(*args, **(kwargs or {}))
