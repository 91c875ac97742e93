"""The directory of a run: one process, one specification, whole lines."""

from pathlib import Path

import pytest

from pocl.errors import WorkdirInUse, WorkdirMismatch
from pocl.events import Event, PhaseChanged, from_line
from pocl.spec import DistillationSpec, resolve
from pocl.storage.workdir import EventLog, lock_workdir, pin_again, pin_spec

SPEC = resolve({"teacher": {"random": {}}, "student": {"random": {}}, "data": {"train": {"path": "rows.jsonl"}}})


def with_threads(spec: DistillationSpec, threads: int) -> DistillationSpec:
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"threads": threads})})


def test_second_process_is_refused(tmp_path: Path) -> None:
    with lock_workdir(tmp_path), pytest.raises(WorkdirInUse), lock_workdir(tmp_path):
        pass
    with lock_workdir(tmp_path):
        pass


def test_continued_run_keeps_the_pinned_choices(tmp_path: Path) -> None:
    first = pin_spec(tmp_path, SPEC, with_threads(SPEC, 2))
    assert first.resources.threads == 2
    assert pin_spec(tmp_path, SPEC, with_threads(SPEC, 8)) == first


def test_continued_run_keeps_the_sizes_that_were_pinned_after_its_start(tmp_path: Path) -> None:
    pinned = pin_spec(tmp_path, SPEC, with_threads(SPEC, 2))
    with_sizes = pinned.with_choices({"training": {"micro_batch_tokens": 64}, "evaluation": {"batch_size": 8}})
    pin_again(tmp_path, with_sizes)
    assert pin_spec(tmp_path, SPEC, with_threads(SPEC, 8)) == with_sizes
    assert with_sizes.evaluation.batch_size == 8


def test_another_specification_is_refused(tmp_path: Path) -> None:
    pin_spec(tmp_path, SPEC, with_threads(SPEC, 2))
    other = SPEC.model_copy(update={"seed": 11})
    with pytest.raises(WorkdirMismatch):
        pin_spec(tmp_path, other, other)


def test_threads_set_by_the_client_are_part_of_the_specification(tmp_path: Path) -> None:
    posted = with_threads(SPEC, 2)
    pin_spec(tmp_path, posted, posted)
    with pytest.raises(WorkdirMismatch):
        pin_spec(tmp_path, with_threads(SPEC, 3), with_threads(SPEC, 3))


def test_torn_line_is_cut_before_the_next_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events: list[Event] = []
    with EventLog(path, events.append) as log:
        log(PhaseChanged(phase="loading"))
    path.write_bytes(path.read_bytes() + b'{"at": "2026')
    with EventLog(path, events.append) as log:
        log(PhaseChanged(phase="training", stage=0))
    assert [from_line(line).event for line in path.read_bytes().splitlines()] == events
