"""The tiny job goes through the real engine, and fails where the worker's device is gone."""

import os
import sys
from pathlib import Path

import pytest

from domain.workers.models import Device
from worker.engine_environment import engine_environment
from worker.self_check import SelfCheck

ENGINE = (sys.executable, "-m", "pocl", "run")


def check(work_root: Path, device: Device) -> str | None:
    def environment(temporary: Path) -> dict[str, str]:
        # As on a machine whose driver shows no GPU, whatever this one has.
        return engine_environment(os.environ, temporary, home=work_root / "home", visible_devices="")

    return SelfCheck(ENGINE, work_root, [device], environment, timeout_seconds=250)()


@pytest.mark.slow
def test_worker_that_can_run_the_engine_is_well(tmp_path: Path) -> None:
    assert check(tmp_path, Device("cpu", "CPU", None)) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_worker_whose_gpu_is_gone_is_sick(tmp_path: Path) -> None:
    finding = check(tmp_path, Device("cuda", "NVIDIA L4", 24 << 30))
    assert finding is not None
    assert finding.startswith("A tiny job failed with ")
