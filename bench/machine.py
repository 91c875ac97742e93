"""What a measurement depends on besides the code: the machine, its load, versions, and its peak arithmetic rate."""

import os
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pocl.models.precision import choose_device, choose_precision

_SIDE, _GPU_SIDE = 2048, 8192
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
    """The rate of the fastest of some square matrix products on the device, by number format; None where the format is
    emulated."""
    gpu: str | None = None
    """The card's name, its memory, and the CUDA version that torch was built for; None on a CPU."""

    @classmethod
    def measure(cls, device: torch.device | None = None, side: int | None = None) -> "Machine":
        """Measure the machine; the peaks are those of `device`, the CPU unless given.

        Args:
            side: Rows and columns of the matrices that are multiplied; by default as many as reach the peak.
        """
        device = device or choose_device("cpu")
        load = os.getloadavg()[0]
        bf16 = choose_precision("auto", device).name == "bf16"
        return cls(
            cpu=_cpu_name(),
            instruction_set=str(torch.backends.cpu.get_cpu_capability()),
            cores=len(os.sched_getaffinity(0)),
            threads=torch.get_num_threads(),
            load_average=round(load, 2),
            versions={name: _version(name) for name in ("torch", "transformers", "trl")},
            peak_gflops={
                "fp32": _matrix_peak(torch.float32, device, side),
                "bf16": _matrix_peak(torch.bfloat16, device, side) if bf16 else None,
            },
            gpu=_gpu_name(device) if device.type == "cuda" else None,
        )

    def text(self) -> str:
        peaks = ", ".join(
            f"no {name} products on this machine" if peak is None else f"{name} {peak:.0f} GFLOP/s"
            for name, peak in self.peak_gflops.items()
        )
        versions = ", ".join(f"{name} {installed or 'absent'}" for name, installed in self.versions.items())
        return (
            f"{self.cpu} ({self.instruction_set}), {self.cores} cores, {self.threads} threads, "
            f"load average {self.load_average}\n"
            + ("" if self.gpu is None else f"{self.gpu}\n")
            + f"{versions}\nmatrix peak of this run: {peaks}"
        )


def _matrix_peak(dtype: torch.dtype, device: torch.device, side: int | None) -> float:
    """The peak rate of matrix products, in GFLOP/s."""
    side = side or (_GPU_SIDE if device.type == "cuda" else _SIDE)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    torch.mm(left, right)
    synchronize(device)
    for _ in range(_REPEATS):
        start = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds) / 1e9


def synchronize(device: torch.device) -> None:
    """Wait until all work that was given to `device` is done; a CPU's is done when the call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gpu_name(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / (1 << 30)
    return f"{properties.name}, {memory:.0f} GiB, CUDA {torch.version.cuda}"


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
