"""What a measurement depends on besides the code: the machine, its load, versions, and its peak arithmetic rate."""

import os
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pocl.models.precision import choose_device, choose_precision

_SIDE = 2048
_REPEATS = 10


@dataclass(frozen=True)
class Machine:
    """The machine of a measurement, as it was at its start."""

    cpu: str
    instruction_set: str
    cores: int
    """The number of cores that the process may use."""
    threads: int
    load_average: float
    """The mean number of runnable processes in the minute before the start; well above 0, others share the cores."""
    versions: dict[str, str | None]
    peak_gflops: dict[str, float | None]
    """The rate of the fastest of some square matrix products, by number format; None where the format is emulated."""

    @classmethod
    def measure(cls) -> "Machine":
        load = os.getloadavg()[0]
        bf16 = choose_precision("auto", choose_device("cpu")).name == "bf16"
        return cls(
            cpu=_cpu_name(),
            instruction_set=str(torch.backends.cpu.get_cpu_capability()),
            cores=len(os.sched_getaffinity(0)),
            threads=torch.get_num_threads(),
            load_average=round(load, 2),
            versions={name: _version(name) for name in ("torch", "transformers", "trl")},
            peak_gflops={
                "fp32": _matrix_peak(torch.float32),
                "bf16": _matrix_peak(torch.bfloat16) if bf16 else None,
            },
        )

    def text(self) -> str:
        peaks = ", ".join(
            f"no {name} products on this machine" if peak is None else f"{name} {peak:.0f} GFLOP/s"
            for name, peak in self.peak_gflops.items()
        )
        versions = ", ".join(f"{name} {installed or 'absent'}" for name, installed in self.versions.items())
        return (
            f"{self.cpu} ({self.instruction_set}), {self.cores} cores, {self.threads} threads, "
            f"load average {self.load_average}\n{versions}\nmatrix peak of this run: {peaks}"
        )


def _matrix_peak(dtype: torch.dtype) -> float:
    """The peak rate of matrix products, in GFLOP/s."""
    left, right = (torch.randn(_SIDE, _SIDE).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * _SIDE**3 / min(seconds) / 1e9


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
