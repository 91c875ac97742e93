"""A full disk ends a run with its code, spares intact files, and costs nothing once there is space again.

The disk is real and small: a tmpfs in a mount namespace of its own.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.faults.small_disk import find_namespace


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the cases in `on_small_disk`."""
    return run_on_small_disk("tests.faults.on_small_disk", tmp_path_factory.mktemp("disk"))


def run_on_small_disk(module: str, disk: Path) -> dict[str, Any]:
    """Run a program that mounts a disk of its own over a directory; the last line that it prints."""
    namespace = find_namespace()
    assert namespace is not None, "no mount namespace can be created, so no disk can be filled"
    command = [*namespace, sys.executable, "-m", module, str(disk)]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert out.returncode == 0, out.stderr
    answer: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize(
    ("case", "line", "intact_step"),
    [
        ("ranking", "scratch.write_text(text", None),
        ("weights", "export.write(model, scratch, state.progress_before_scores)", 2),
        ("optimizer", "save_file(moments, training / _OPTIMIZER)", 2),
        ("exporting", "student.export.link(", 10),
    ],
)
def test_full_disk_ends_the_run_and_spares_intact_files(
    results: dict[str, Any], case: str, line: str, intact_step: int | None
) -> None:
    result = results[case]
    assert (result["code"], result["reported_code"], result["last_logged"]) == ("disk_full", "disk_full", "run_ended")
    assert line in result["where"]
    assert result["intact_step"] == intact_step
    assert (result["manifest_errors"], result["scratch_paths"]) == ([], [])


def test_run_continued_after_a_full_disk_ends_in_the_same_bits(results: dict[str, Any]) -> None:
    assert results["differences"] == []


def test_event_log_keeps_complete_lines_and_room_for_the_end(results: dict[str, Any]) -> None:
    assert results["log"] == {"refused": True, "complete": True, "ended": True, "reported": True}


def test_full_disk_under_the_database_is_said_and_jobs_can_be_cancelled(tmp_path: Path) -> None:
    result = run_on_small_disk("tests.faults.service_on_small_disk", tmp_path)
    assert (result["reason"], result["fault"]) == ("disk_full", "capacity")
    assert result["waiting_job"] == "cancelled"
    assert result["commits"] == result["tried"]
    assert result["status_afterwards"] == "succeeded"
