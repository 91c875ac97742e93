"""The liveness probe that a supervisor of containers runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from worker.liveness import Liveness


@pytest.fixture
def liveness(tmp_path: Path) -> Liveness:
    return Liveness(tmp_path / "liveness")


def probe(liveness: Liveness) -> int:
    return subprocess.run([sys.executable, "-m", "worker.liveness", liveness.file]).returncode


@pytest.mark.system
def test_probe_succeeds_after_a_beat_and_not_before(liveness: Liveness) -> None:
    assert probe(liveness) == 1
    liveness.beat()
    assert probe(liveness) == 0
    assert list(liveness.file.parent.iterdir()) == [liveness.file]


@pytest.mark.parametrize(
    "content", ["-100.0", "1e18", "", "soon"], ids=["old", "of an earlier boot", "empty", "damaged"]
)
def test_beat_that_is_not_of_the_last_minute_is_not_fresh(liveness: Liveness, content: str) -> None:
    liveness.file.write_text(content)
    assert not liveness.is_fresh()


def test_unwritable_file_does_not_stop_the_loop(tmp_path: Path) -> None:
    liveness = Liveness(tmp_path / "gone" / "liveness")
    liveness.beat()
    assert not liveness.is_fresh()
