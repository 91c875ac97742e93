"""The devices that a worker reports."""

from pathlib import Path

import pytest

from tests.support.harness import ServiceHarness
from worker.devices import detect_devices
from worker.supervisor import engine_environment

ANSWER = "0, NVIDIA H100 80GB HBM3, 81559\n1, NVIDIA L4, 23034\n"
GPUS = [("cuda", "NVIDIA H100 80GB HBM3", 81559 << 20), ("cuda", "NVIDIA L4", 23034 << 20)]


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    path = tmp_path / "driver"
    path.touch()
    return path


def test_machine_with_gpus_takes_jobs_for_the_cpu_too(harness: ServiceHarness, driver: Path) -> None:
    devices = detect_devices(harness.options(), driver=driver, query=lambda: ANSWER)
    assert [(each.kind, each.name, each.memory_bytes) for each in devices[:-1]] == GPUS
    assert devices[-1].kind == "cpu"
    assert (devices[-1].memory_bytes or 0) > 1 << 28


def test_machine_without_gpus_has_its_cpu(harness: ServiceHarness, tmp_path: Path) -> None:
    devices = detect_devices(
        harness.options(), driver=tmp_path / "none", query=lambda: pytest.fail("there is no driver to query")
    )
    assert [each.kind for each in devices] == ["cpu"]


def test_worker_uses_only_its_own_gpus(harness: ServiceHarness, driver: Path) -> None:
    owner = harness.options(gpus=(1,), device="cuda")
    assert [each.name for each in detect_devices(owner, driver=driver, query=lambda: ANSWER)] == ["NVIDIA L4"]
    assert engine_environment({"CUDA_VISIBLE_DEVICES": "0"}, Path("/tmp"), owner.gpus)["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize("answer", ["", "no devices were found", "0, Strange, [N/A]"])
def test_unreadable_answer_of_the_driver_leaves_the_memory_unknown(
    harness: ServiceHarness, driver: Path, answer: str
) -> None:
    (device,) = detect_devices(harness.options(device="cuda"), driver=driver, query=lambda: answer)
    assert (device.kind, device.memory_bytes) == ("cuda", None)
