"""The devices that this worker computes on, detected without loading torch."""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from domain.workers.models import Device
from worker.settings import WorkerSettings

_DRIVER = Path("/proc/driver/nvidia/version")
_QUERY = ("nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits")
_TIMEOUT_SECONDS = 30


def query_driver() -> str:
    """The driver's list of GPUs, one a line: index, name, memory in MiB; empty where the driver does not answer."""
    try:
        completed = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return completed.stdout if completed.returncode == 0 else ""


def detect_devices(
    options: WorkerSettings, *, driver: Path = _DRIVER, query: Callable[[], str] = query_driver
) -> tuple[Device, ...]:
    """The devices that jobs may use here. A worker with GPUs takes jobs for the CPU too, unless it is set to `cuda`."""
    devices: list[Device] = []
    if options.device == "cuda" or (options.device == "auto" and driver.exists()):
        devices += _gpus(query(), options.gpus) or [Device("cuda", "NVIDIA GPU", None)]
    if options.device != "cuda":
        devices.append(Device("cpu", "CPU", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    return tuple(devices)


def _gpus(answer: str, owned: Sequence[int] | None) -> list[Device]:
    devices = []
    for line in answer.splitlines():
        index, _, rest = line.partition(",")
        name, _, memory = rest.rpartition(",")
        if not index.strip().isdigit() or (owned is not None and int(index) not in owned):
            continue
        mebibytes = memory.strip()
        devices.append(Device("cuda", name.strip(), int(mebibytes) << 20 if mebibytes.isdigit() else None))
    return devices
