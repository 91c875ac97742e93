"""A full disk ends a run under its code, spares what is whole, and costs nothing once there is space again.

The disk is real and small: a tmpfs in a mount namespace of its own.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NAMESPACES = (["unshare", "--user", "--map-root-user", "--mount"], ["unshare", "--mount"])
"""How a namespace is had: by anyone where user namespaces are allowed, and by root."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the cases came to."""
    disk = tmp_path_factory.mktemp("disk")
    command = [*namespace(), sys.executable, "-m", "tests.faults.on_small_disk", str(disk)]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert out.returncode == 0, out.stderr
    answer: dict[str, Any] = json.loads(out.stdout)
    return answer


def namespace() -> list[str]:
    tried = [subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False) for prefix in NAMESPACES]
    for prefix, out in zip(NAMESPACES, tried, strict=True):
        if out.returncode == 0:
            return prefix
    pytest.fail(f"no mount namespace can be had, so no disk can be filled: {[out.stderr for out in tried]}")


@pytest.mark.parametrize(
    ("case", "line", "whole_step"),
    [
        ("ranking", "scratch.write_text(text", None),
        ("weights", "save_model(model, tokenizer, scratch)", 2),
        ("optimizer", "save_file(moments, training / _OPTIMIZER)", 2),
        ("exporting", "write_result(self._workdir", 10),
    ],
)
def test_full_disk_ends_the_run_and_spares_intact_files(
    found: dict[str, Any], case: str, line: str, whole_step: int | None
) -> None:
    came = found[case]
    assert (came["code"], came["told"], came["written"]) == ("disk_full", "disk_full", "run_ended")
    assert line in came["where"]
    assert came["whole_step"] == whole_step
    assert (came["damaged"], came["litter"]) == ([], [])


def test_run_continued_after_a_full_disk_ends_in_the_same_bits(found: dict[str, Any]) -> None:
    assert found["differences"] == []


def test_event_log_keeps_complete_lines_and_room_for_the_end(found: dict[str, Any]) -> None:
    assert found["log"] == {"refused": True, "whole": True, "ended": True, "heard": True}
