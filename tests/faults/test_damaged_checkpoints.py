"""A damaged checkpoint costs the steps since the one before it, and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.faults.outcome import RunOutcome, manifest_errors, scratch_paths
from pocl.errors import WorkdirMismatch
from pocl.events import RunStarted
from pocl.layout import (
    CHECKPOINTS_DIR,
    TRAINING_DIR,
    WEIGHTS_FILE,
    checkpoint_dir,
    checkpoint_name,
)
from pocl.storage import manifest
from pocl.train import checkpoint
from tests.faults.runs import run_to_end, run_until, warning_codes

STOPPED_AT, BEFORE = 7, 5


@pytest.fixture(scope="module")
def stopped(restart: Path) -> Path:
    """A run that was stopped in its last stage, with two training states."""
    workdir = restart.parent / "stopped"
    run_until(STOPPED_AT, restart, workdir)
    return workdir


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


def overwrite(file: Path) -> None:
    file.write_text("\x00 not what was here")


def empty_list(file: Path) -> None:
    file.write_text('{"format": 1, "files": []}')


DAMAGE = [
    (truncate, WEIGHTS_FILE),
    (flip, "training/optimizer.safetensors"),
    (flip, "training/rng.safetensors"),
    (remove, "training/rng.safetensors"),
    (remove, "manifest.json"),
    (remove, "training/manifest.json"),
    (overwrite, "training/state.json"),
    (overwrite, "training/row_scores.json"),
    (overwrite, "manifest.json"),
    (empty_list, "training/manifest.json"),
]


@pytest.mark.parametrize(("damage", "file"), DAMAGE)
def test_damaged_newest_checkpoint_is_skipped(
    stopped: Path, damage: Callable[[Path], None], file: str, tmp_path: Path
) -> None:
    root = shutil.copytree(stopped, tmp_path / "run") / CHECKPOINTS_DIR
    damage(root / checkpoint_name(STOPPED_AT) / file)
    restored, warnings = checkpoint.find_resume_point(root)
    assert restored is not None
    assert restored.state.step == BEFORE
    assert len(warnings) == 1


@pytest.mark.parametrize(("damage", "file"), [(flip, WEIGHTS_FILE), (remove, "training/state.json")])
def test_run_continues_from_the_checkpoint_before_to_the_same_bits(
    restart: Path, baseline: RunOutcome, stopped: Path, damage: Callable[[Path], None], file: str, tmp_path: Path
) -> None:
    workdir = shutil.copytree(stopped, tmp_path / "run")
    damage(workdir / checkpoint_dir(STOPPED_AT) / file)
    events = run_to_end(restart, workdir)
    assert warning_codes(events) == ["checkpoint_passed_over"]
    assert [event.resumed_from_step for event in events if isinstance(event, RunStarted)] == [BEFORE]
    assert RunOutcome.read(workdir).differences(baseline) == []
    assert (manifest_errors(workdir), scratch_paths(workdir)) == ([], set())


def test_scores_of_another_training_state_are_damage(stopped: Path, tmp_path: Path) -> None:
    root = shutil.copytree(stopped, tmp_path / "run") / CHECKPOINTS_DIR
    training = root / checkpoint_name(STOPPED_AT) / TRAINING_DIR
    (training / "row_scores.json").write_text("[]")
    (training / "manifest.json").unlink()
    manifest.write_manifest(training)
    restored, warnings = checkpoint.find_resume_point(root)
    assert restored is not None
    assert restored.state.step == BEFORE
    assert "row_scores.json" in warnings[0]


def test_run_without_an_intact_checkpoint_starts_again_with_a_warning(
    restart: Path, baseline: RunOutcome, stopped: Path, tmp_path: Path
) -> None:
    workdir = shutil.copytree(stopped, tmp_path / "run")
    for state in workdir.glob("checkpoints/*/training/state.json"):
        overwrite(state)
    events = run_to_end(restart, workdir)
    assert warning_codes(events) == ["checkpoint_passed_over"] * 2 + ["started_again"]
    assert RunOutcome.read(workdir).differences(baseline) == []


def test_intact_checkpoint_of_another_version_is_not_discarded(restart: Path, stopped: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(stopped, tmp_path / "run")
    training = workdir / checkpoint_dir(STOPPED_AT) / TRAINING_DIR
    (training / "state.json").write_text('{"of_another_version": 1}')
    (training / "manifest.json").unlink()
    manifest.write_manifest(training)
    with pytest.raises(WorkdirMismatch, match="cannot be read by this version"):
        run_to_end(restart, workdir)
    manifest.verify(training)


def test_damaged_checkpoint_beyond_the_run_does_not_displace_an_intact_one(tmp_path: Path) -> None:
    for step, is_resumable in ((2, True), (4, True), (6, True), (9, True), (12, False)):
        (tmp_path / checkpoint_name(step) / (TRAINING_DIR if is_resumable else "")).mkdir(parents=True)
    checkpoint.prune(tmp_path, step=6, keep=2, stage_ends={2})
    remaining = {path.name: (path / TRAINING_DIR).is_dir() for path in tmp_path.iterdir()}
    # 9 was damaged; 12 holds the weights of a stage that an earlier attempt finished.
    expected = {2: False, 4: True, 6: True, 12: False}
    assert remaining == {checkpoint_name(step): is_resumable for step, is_resumable in expected.items()}
