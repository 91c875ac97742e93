"""One process at a time in a working directory, and no scratch files of those before it."""

from pathlib import Path

import pytest

from pocl.__main__ import read_spec
from pocl.errors import WorkdirInUse
from pocl.events import Event, RunEnded, RunFinished, from_line
from pocl.layout import EVENTS_FILE, WEIGHTS_FILE, checkpoint_dir
from pocl.run import run
from pocl.storage import manifest
from pocl.storage.workdir import EventLog, lock_workdir
from tests.faults.runs import run_to_end


def test_second_run_in_the_directory_is_refused_and_writes_nothing(restart: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    with lock_workdir(tmp_path):
        with pytest.raises(WorkdirInUse):
            run(read_spec(restart), tmp_path, events.append)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    # The caller gets the event nevertheless.
    assert [event.code for event in events if isinstance(event, RunEnded)] == ["workdir_in_use"]


def test_lock_is_released_with_the_run(restart: Path, tmp_path: Path) -> None:
    assert isinstance(run_to_end(restart, tmp_path)[-1], RunFinished)
    with lock_workdir(tmp_path):
        pass


@pytest.mark.parametrize(
    "path",
    [
        ".tmp-final-1/model.safetensors",
        ".tmp-result.json-1",
        "checkpoints/.tmp-step-00000002-1/training/state.json",
        "checkpoints/step-00000002/.tmp-gone-training-1/state.json",
    ],
)
def test_scratch_of_a_killed_process_is_swept(tmp_path: Path, path: str) -> None:
    scratch, checkpoint = tmp_path / path, tmp_path / checkpoint_dir(2) / WEIGHTS_FILE
    for file in (scratch, checkpoint):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    with lock_workdir(tmp_path):
        assert not [entry for entry in tmp_path.rglob("*") if entry.name.startswith(manifest.SCRATCH_PREFIX)]
        assert checkpoint.exists()


def test_torn_line_is_cut_off_and_the_next_is_complete(tmp_path: Path) -> None:
    path = tmp_path / EVENTS_FILE
    ended, reported = RunFinished(step=3), list[Event]()
    with EventLog(path, reported.append) as log:
        log(ended)
    path.write_bytes(path.read_bytes() + b'{"at": "2026-')
    with EventLog(path, reported.append) as log:
        log(ended)
    assert [from_line(line).event for line in path.read_bytes().splitlines()] == [ended, ended]
    assert [entry.name for entry in tmp_path.iterdir()] == [EVENTS_FILE]
