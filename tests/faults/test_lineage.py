"""A checkpoint at the end of a stage is all that another run needs to continue from there, alike or otherwise."""

import shutil
from pathlib import Path
from typing import Any

from bench.faults.outcome import RunOutcome
from bench.faults.small_runs import write_variant
from pocl.events import Event, RunStarted, StageStarted, StepLogged
from pocl.layout import (
    RANKING_FILE,
    RANKING_INPUTS_FILE,
    checkpoint_dir,
)
from tests.faults.runs import run_to_end, run_until

STAGE_END = 2
COPIED_FILES = (RANKING_FILE, RANKING_INPUTS_FILE)


def continue_elsewhere(spec: Path, source: Path, workdir: Path) -> list[Event]:
    """Run `spec` in a new directory, with the ranking and the checkpoint at the end of the first stage of `source`."""
    workdir.mkdir()
    for name in COPIED_FILES:
        shutil.copy(source / name, workdir / name)
    state = checkpoint_dir(STAGE_END)
    shutil.copytree(source / state, workdir / state)
    return run_to_end(spec, workdir)


def variant(directory: Path, **changes: Any) -> Path:
    return write_variant(directory, "restart", **changes)


def test_same_specification_continued_elsewhere_ends_in_the_same_weights(
    restart: Path, baseline: RunOutcome, tmp_path: Path
) -> None:
    run_until(STAGE_END + 1, restart, tmp_path / "first")
    events = continue_elsewhere(restart, tmp_path / "first", tmp_path / "second")
    assert [event.resumed_from_step for event in events if isinstance(event, RunStarted)] == [STAGE_END]
    assert RunOutcome.read(tmp_path / "second").final == baseline.final


def test_another_method_and_temperature_apply_from_the_next_stage(restart: Path, tmp_path: Path) -> None:
    run_until(STAGE_END + 1, restart, tmp_path / "first")
    other = variant(tmp_path, method="reverse_kl", curriculum={"temperature": {"start": 1.0, "end": 5.0}})
    events = continue_elsewhere(other, tmp_path / "first", tmp_path / "second")
    assert [event.stage for event in events if isinstance(event, StageStarted)] == [1, 2]
    assert [event.temperature for event in events if isinstance(event, StageStarted)] == [3.0, 5.0]
    assert min(event.step for event in events if isinstance(event, StepLogged)) == STAGE_END + 1
