"""What the driver says of the GPUs of this worker, for its heartbeats.

A driver that is in trouble answers late or never. So it is asked in a thread of its own, and a heartbeat takes what was
said last.
"""

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from domain.workers.models import Device, GpuFigures
from worker.devices import DRIVER_FILES, has_driver

_MAX_AGE_SECONDS: Final = 60.0
"""Older figures are not reported: those of a driver that no longer answers would look like good ones."""
_TEMPERATURE_OF_GPU: Final = 0
_log = structlog.get_logger(__name__)

ReadGpus = Callable[[Sequence[Device]], list[GpuFigures]]
"""Asks the driver."""


class GpuSampler:
    """Asks the driver in a daemon thread.

    Args:
        devices: the devices of the worker.
        interval: seconds between two questions.
        read: asks the driver; its library unless given.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        interval: float,
        read: ReadGpus | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._devices = [device for device in devices if device.kind == "cuda" and device.uuid is not None]
        self._interval = interval
        self._read = read or load_reader()
        self._clock = clock
        self._sample: tuple[float, list[GpuFigures]] | None = None

    def start(self) -> None:
        """Ask from now on, where there is a driver and a GPU to ask for."""
        if self._read is not None and self._devices:
            threading.Thread(target=self._run, name="gpu-sampler", daemon=True).start()

    def sample(self) -> None:
        """Ask once."""
        if self._read is not None:
            self._sample = self._clock(), self._read(self._devices)

    def latest(self) -> list[GpuFigures]:
        """What the driver said last; nothing where it has said nothing lately."""
        if self._sample is None or self._clock() - self._sample[0] > _MAX_AGE_SECONDS:
            return []
        return self._sample[1]

    def _run(self) -> None:
        while True:
            self.sample()
            time.sleep(self._interval)


def load_reader(driver_files: Sequence[Path] = DRIVER_FILES) -> ReadGpus | None:
    """A reader by the driver's library; None where there is no driver, or the library cannot be used."""
    if not has_driver(driver_files):
        return None
    try:
        # Of the extra `engine`; it ships no types.
        library: Any = importlib.import_module("pynvml")
        library.nvmlInit()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the worker trains without figures
        _log.warning("gpu_figures_unavailable", error=str(error))
        return None
    return lambda devices: [_read_device(library, device) for device in devices]


def _read_device(library: Any, device: Device) -> GpuFigures:
    """What the library says of a device; null for what it does not, as of the utilization of a MIG instance."""

    def ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except library.NVMLError:
            return None

    handle = ask(lambda: library.nvmlDeviceGetHandleByUUID(device.uuid))
    if handle is None:
        return GpuFigures(device.uuid or "", device.name, device.memory_bytes)
    memory = ask(lambda: library.nvmlDeviceGetMemoryInfo(handle))
    utilization = ask(lambda: library.nvmlDeviceGetUtilizationRates(handle).gpu)
    temperature = ask(lambda: library.nvmlDeviceGetTemperature(handle, _TEMPERATURE_OF_GPU))
    return GpuFigures(
        device.uuid or "",
        device.name,
        memory_bytes=device.memory_bytes if memory is None else int(memory.total),
        memory_used_bytes=None if memory is None else int(memory.used),
        utilization=None if utilization is None else utilization / 100,
        temperature_celsius=None if temperature is None else float(temperature),
    )
