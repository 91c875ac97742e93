"""A loss, gradient or weight that is not finite ends the run with `loss_diverged`, and is in no checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.faults.outcome import manifest_errors
from bench.faults.small_runs import write_variant
from pocl.__main__ import read_spec
from pocl.errors import LossDiverged
from pocl.events import Event, RunEnded
from pocl.layout import (
    CHECKPOINTS_DIR,
    FINAL_DIR,
    RANKING_FILE,
    WEIGHTS_FILE,
    checkpoint_dir,
)
from pocl.run import run
from pocl.spec import DistillationSpec
from pocl.storage import manifest
from tests.faults.runs import run_to_end, run_until, with_learning_rate


def diverge(spec: DistillationSpec, workdir: Path) -> str:
    """Run until the loss diverges; the message."""
    events: list[Event] = []
    with pytest.raises(LossDiverged) as caught:
        run(spec, workdir, events.append)
    assert isinstance(events[-1], RunEnded)
    assert events[-1].code == "loss_diverged"
    return caught.value.message


def saved_checkpoints(workdir: Path) -> list[str]:
    """The names of the checkpoints, all of which must be intact and finite."""
    assert manifest_errors(workdir) == []
    for file in workdir.glob("checkpoints/**/*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values()), file
    return sorted(path.name for path in (workdir / CHECKPOINTS_DIR).glob("*"))


def replace_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights of a checkpoint, and write a manifest that matches them."""
    file = directory / WEIGHTS_FILE
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    (directory / manifest.MANIFEST).unlink()
    manifest.write_manifest(directory)


def sample_digests(workdir: Path) -> list[str]:
    return [json.loads(line)["digest"][:12] for line in (workdir / RANKING_FILE).read_text().splitlines()]


def test_huge_learning_rate_ends_the_run_at_the_step_that_shows_it(restart: Path, tmp_path: Path) -> None:
    message = diverge(with_learning_rate(restart, 1e30), tmp_path)
    assert "at step 2; its samples are" in message
    digests = message.rpartition("are ")[2].split(", ")
    # The first stage has six samples, in batches of four and two.
    assert len(digests) == 2
    assert set(digests) <= set(sample_digests(tmp_path))
    assert saved_checkpoints(tmp_path) == []


def test_overflowed_weights_are_not_saved(tmp_path: Path) -> None:
    spec = write_variant(tmp_path, "restart", checkpoints={"every_steps": 1})
    assert "is not finite after step 1" in diverge(with_learning_rate(spec, 1e39), tmp_path / "run")
    assert saved_checkpoints(tmp_path / "run") == []


def make_nan(weights: dict[str, torch.Tensor]) -> None:
    weights["transformer.h.0.ln_1.weight"][0] = torch.nan


def make_huge(weights: dict[str, torch.Tensor]) -> None:
    # The logits stay finite, and so does the loss; the square of the gradient's norm does not.
    weights["transformer.ln_f.weight"] *= 1e24


@pytest.mark.parametrize(("change", "what"), [(make_nan, "loss"), (make_huge, "gradient")])
def test_non_finite_weights_are_not_trained_on(
    restart: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], what: str
) -> None:
    run_until(4, restart, tmp_path)
    checkpoint = tmp_path / checkpoint_dir(4)
    replace_weights(checkpoint, change)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / CHECKPOINTS_DIR).rglob("*")}
    assert f"the {what} is not finite at step 5; its samples are" in diverge(read_spec(restart), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / CHECKPOINTS_DIR).rglob("*")} == before


def test_untrained_student_without_a_finite_loss_is_refused_while_ranking(restart: Path, tmp_path: Path) -> None:
    run_to_end(restart, tmp_path / "source")
    student = tmp_path / "source" / FINAL_DIR
    replace_weights(student, make_nan)
    spec = write_variant(tmp_path, "restart", student={"path": str(student)})
    assert "the loss of the model that ranks is not finite on sample" in diverge(read_spec(spec), tmp_path / "run")
    assert not (tmp_path / "run" / RANKING_FILE).exists()
