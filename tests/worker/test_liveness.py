"""A sign of life that a supervisor of containers can ask for."""

import subprocess
import sys
from pathlib import Path

import pytest

from worker.liveness import Liveness


@pytest.fixture
def pulse(tmp_path: Path) -> Liveness:
    return Liveness(tmp_path / "pulse")


def asked(pulse: Liveness) -> int:
    return subprocess.run([sys.executable, "-m", "worker.liveness", pulse.file]).returncode


def test_it_is_fresh_after_a_beat_and_not_before(pulse: Liveness) -> None:
    assert asked(pulse) == 1
    pulse.beat()
    assert asked(pulse) == 0
    assert list(pulse.file.parent.iterdir()) == [pulse.file]


@pytest.mark.parametrize(
    "written", ["-100.0", "1e18", "", "soon"], ids=["old", "of an earlier boot", "empty", "damaged"]
)
def test_what_is_not_of_the_last_minute_is_not_fresh(pulse: Liveness, written: str) -> None:
    pulse.file.write_text(written)
    assert not pulse.is_fresh()


def test_where_it_cannot_be_written_the_loop_goes_on(tmp_path: Path) -> None:
    pulse = Liveness(tmp_path / "gone" / "pulse")
    pulse.beat()
    assert not pulse.is_fresh()
