"""What the GPU does during a piece of work: how long it is busy, and what the host gives it and waits for."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.machine import synchronize

_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_ON_HOST = {"cuda_runtime", "cuda_driver"}
"""Categories of a trace of Kineto, torch's profiler."""

TraceEvent = Mapping[str, Any]


@dataclass(frozen=True)
class Activity:
    """A GPU's part in a piece of work."""

    busy_seconds: float
    """While at least one kernel or copy runs."""
    launches: int
    """Kernels and graphs that the host launches."""
    synchronisations: int
    """How often the host waits for the device, but for the wait that ends the work."""

    @classmethod
    def from_trace(cls, events: Sequence[TraceEvent]) -> "Activity":
        """The activity in the events of a trace, whose times are in microseconds."""
        timed = [event for event in events if event.get("ph") == "X"]
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in timed if e.get("cat") in _ON_DEVICE)
        calls = [str(event["name"]) for event in timed if event.get("cat") in _ON_HOST]
        return cls(
            busy_seconds=_covered(spans) / 1e6,
            launches=sum("Launch" in call for call in calls),
            # The benchmark itself ends the work with `cudaDeviceSynchronize`, which the engine never calls.
            synchronisations=sum(
                call in ("cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cudaMemcpy")
                for call in calls
            ),
        )


def profile(work: Callable[[], object], device: torch.device) -> Activity | None:
    """The activity of a GPU during `work`; None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        synchronize(device)
    with tempfile.TemporaryDirectory(prefix="pocl-bench-") as directory:
        file = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return Activity.from_trace(json.loads(file.read_text())["traceEvents"])


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of spans that are ordered by their beginnings."""
    total = end = 0.0
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
