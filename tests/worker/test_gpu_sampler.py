"""What the driver says of GPUs, by a library that stands in for NVIDIA's."""

import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from domain.workers.models import Device, GpuFigures
from worker.gpu_sampler import GpuSampler, load_reader

GPU = Device("cuda", "NVIDIA H100", 80 << 30, "GPU-1")
INSTANCE = Device("cuda", "NVIDIA H100 MIG 1g", 10 << 30, "MIG-2")
GONE = Device("cuda", "NVIDIA L4", 24 << 30, "GPU-3")


class FakeLibrary(types.ModuleType):
    """As much of NVIDIA's library as is asked for."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, *, works: bool = True) -> None:
        super().__init__("pynvml")
        self.works = works

    def nvmlInit(self) -> None:
        if not self.works:
            raise self.NVMLError("Driver/library version mismatch")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid == GONE.uuid:
            raise self.NVMLError("GPU is lost")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=80 << 30 if handle == GPU.uuid else 10 << 30, used=1 << 30)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if handle == INSTANCE.uuid:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=25, memory=3)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        assert sensor == 0
        if handle == INSTANCE.uuid:
            raise self.NVMLError("Not Supported")
        return 61


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    file = tmp_path / "version"
    file.write_text("NVRM")
    return file


def test_figures_are_what_the_driver_says(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It is imported by name, where there is a driver alone: there is no other way in.
    monkeypatch.setitem(sys.modules, "pynvml", FakeLibrary())
    read = load_reader([driver])
    assert read is not None
    assert read([GPU, INSTANCE, GONE]) == [
        GpuFigures("GPU-1", "NVIDIA H100", 80 << 30, 1 << 30, 0.25, 61.0),
        GpuFigures("MIG-2", "NVIDIA H100 MIG 1g", 10 << 30, 1 << 30, None, None),
        GpuFigures("GPU-3", "NVIDIA L4", 24 << 30),
    ]


def test_without_a_driver_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert load_reader([tmp_path / "none"]) is None


def test_a_library_that_fails_costs_the_figures_alone(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeLibrary(works=False))
    assert load_reader([driver]) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert load_reader([driver]) is None


def test_old_figures_are_not_reported() -> None:
    now = 0.0
    asked: list[list[Device]] = []

    def read(devices: Any) -> list[GpuFigures]:
        asked.append(list(devices))
        return [GpuFigures(device.uuid, device.name) for device in devices]

    sampler = GpuSampler([Device("cpu", "CPU", None), GPU], 1, read, clock=lambda: now)
    assert sampler.latest() == []
    sampler.sample()
    assert asked == [[GPU]]
    assert sampler.latest() == [GpuFigures("GPU-1", "NVIDIA H100")]
    now = 61
    assert sampler.latest() == []


def test_what_another_version_stored_is_read() -> None:
    stored = {**GpuFigures("GPU-1", "NVIDIA L4").as_json(), "fan_speed": 3}
    assert GpuFigures.from_json(stored) == GpuFigures("GPU-1", "NVIDIA L4")
