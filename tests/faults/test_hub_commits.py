"""A run stays with the commits of the Hub that it began with, of its models and of its data, wherever branches move."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench.faults.outcome import RunOutcome
from bench.faults.small_runs import spec_and_samples
from pocl.errors import InputsChanged, RunStopped
from pocl.export.model_directory import save_model
from pocl.models.hub import RepoType
from pocl.models.random import byte_level_tokenizer, random_model
from pocl.run import run
from pocl.spec import DistillationSpec, RandomModel, resolve
from pocl.storage.inputs import pinned_inputs
from tests.faults.runs import on_step
from tests.support.local_hub import LocalHub

SHAPE = {"family": "gpt2", "layers": 1, "hidden_size": 16, "heads": 2, "max_positions": 64}
MODELS = ("teacher", "student", "ranker")


def publish_all(hub: LocalHub, directory: Path, *, seed: int) -> dict[str, str]:
    """New commits of every repository; the commits by their keys among the inputs of a run."""
    commits: dict[str, str] = {}
    for number, name in enumerate(MODELS):
        shape = RandomModel.model_validate({**SHAPE, "seed": seed + number})
        save_model(random_model(shape), byte_level_tokenizer(128), directory / name)
        commits[f"someone/{name}@main"] = hub.publish(f"someone/{name}", directory / name)
    rows = directory / "rows"
    rows.mkdir()
    _, train, validation = spec_and_samples("restart")
    (rows / "train.jsonl").write_text(train.replace("Say", "Say" if seed == 1 else "Tell"))
    (rows / "validation.jsonl").write_text(validation)
    commits["datasets/someone/rows@main"] = hub.publish("someone/rows", rows, "dataset")
    return commits


def specification() -> DistillationSpec:
    spec, _, _ = spec_and_samples(
        "restart",
        teacher={"hub": {"repo": "someone/teacher"}},
        student={"hub": {"repo": "someone/student"}},
        curriculum={
            "stages": 2,
            "ranking": {"ranker": {"kind": "model", "model": {"hub": {"repo": "someone/ranker"}}}},
        },
    )
    spec["data"] |= {part: {"hub": {"repo": "someone/rows", "split": part}} for part in ("train", "validation")}
    return resolve(spec)


def run_until(step: int, hub: LocalHub, workdir: Path) -> None:
    logged: set[int] = set()
    with pytest.raises(RunStopped):
        run(specification(), workdir, on_step(logged.add), lambda: step in logged, hub=hub)


def test_branches_that_move_change_no_bit_and_the_result_names_the_first_commits(tmp_path: Path) -> None:
    hub = LocalHub(tmp_path / "hub")
    first = publish_all(hub, tmp_path / "first", seed=1)
    run(specification(), tmp_path / "undisturbed", lambda _: None, hub=hub)
    for step, workdir in ((3, tmp_path / "run"), (1, tmp_path / "gone")):
        run_until(step, hub, workdir)
    second = publish_all(hub, tmp_path / "second", seed=21)
    assert not set(first.values()) & set(second.values())
    run(specification(), tmp_path / "run", lambda _: None, hub=hub)
    assert RunOutcome.read(tmp_path / "run").differences(RunOutcome.read(tmp_path / "undisturbed")) == []
    pinned = pinned_inputs(tmp_path / "run")
    assert pinned is not None
    assert pinned.commits == first
    result: dict[str, Any] = json.loads((tmp_path / "run" / "result.json").read_text())
    named = {name: result[name]["commit"] for name in ("teacher", "student", "ranking_model")}
    assert named == {name: first[f"someone/{name.replace('ranking_model', 'ranker')}@main"] for name in named}
    assert set(result["data_commits"].values()) == {first["datasets/someone/rows@main"]}
    # A commit that the Hub has no more cannot be continued from.
    kinds: tuple[tuple[str, RepoType], ...] = (("ranker", "model"), ("rows", "dataset"))
    for name, kind in kinds:
        prefix = "datasets/" if kind == "dataset" else ""
        commit = first[f"{prefix}someone/{name}@main"]
        shutil.rmtree(hub.directory(f"someone/{name}", commit, kind))
        with pytest.raises(InputsChanged, match=f"someone/{name} at commit {commit[:12]}"):
            run(specification(), tmp_path / "gone", lambda _: None, hub=hub)
