"""Whichever model ranks, the samples are ranked as they are for that model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pocl.__main__ import read_spec
from pocl.errors import DatasetInvalid, InputsChanged, RunStopped
from pocl.events import ArtifactWritten, Event, Warned
from pocl.export.model_directory import save_model
from pocl.models.random import byte_level_tokenizer, random_model
from pocl.run import run
from pocl.spec import RandomModel

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
# A frozen model is whole in the format of the products, a student is not: in fp32 both have the same weights.
SETTINGS = ("curriculum.stages=2", "evaluation.teacher=false", "evaluation.batch_size=4", "training.precision=fp32")
TEACHER = "random: {family: llama, layers: 4, hidden_size: 64, heads: 4, seed: 1}"


@pytest.fixture(scope="module", autouse=True)
def _work_in_the_project_root() -> Iterator[None]:
    # Paths in the example are relative to the root of the project.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """The ranking by the student as it is."""
    return ranked(tmp_path_factory.mktemp("untrained"))


def ranked(
    workdir: Path, *settings: str, stop_after: int | None = None, by_model: bool = True
) -> dict[int, dict[str, Any]]:
    """The ranking of the example, by row; the run stops when it is written, or after so many measured batches."""
    events: list[Event] = []
    partial = workdir / "ranking.partial.jsonl"

    def should_stop() -> bool:
        is_ranked = any(isinstance(event, ArtifactWritten) and event.kind == "ranking" for event in events)
        if stop_after is None or not partial.exists():
            return is_ranked
        # The first line is what was taken from other runs.
        return partial.read_bytes().count(b"\n") > stop_after

    with pytest.raises(RunStopped):
        run(read_spec(ROOT / "examples" / "tiny.yaml", (*SETTINGS, *settings)), workdir, events.append, should_stop)
    if stop_after is not None:
        return {}
    # Random models answer nothing that is right.
    assert any(isinstance(event, Warned) and event.code == "ranking_mostly_zero" for event in events) == by_model
    lines = map(json.loads, (workdir / "ranking.jsonl").read_bytes().splitlines())
    return {line["row"]: line for line in lines}


def test_teacher_and_other_models_rank_as_a_student_of_these_weights_would(
    tmp_path: Path, untrained: dict[int, dict[str, Any]]
) -> None:
    itself = ranked(tmp_path / "student", f"student={{{TEACHER}}}")
    by_teacher = ranked(tmp_path / "teacher", "curriculum.ranking.ranker={kind: teacher}")
    assert by_teacher == itself
    directory = tmp_path / "model"
    directory.mkdir()
    save_model(random_model(RandomModel(layers=4, seed=1)), byte_level_tokenizer(512), directory)
    ranker = f"curriculum.ranking.ranker={{kind: model, model: {{path: {directory}}}}}"
    assert ranked(tmp_path / "other", ranker) == itself
    save_model(random_model(RandomModel(layers=4, seed=2)), byte_level_tokenizer(512), directory)
    with pytest.raises(InputsChanged, match="ranking model"):
        ranked(tmp_path / "other", ranker)
    assert untrained != itself


def test_warm_student_ranks_alike_after_an_interruption(tmp_path: Path, untrained: dict[int, dict[str, Any]]) -> None:
    ranker = "curriculum.ranking.ranker={kind: warm_student, steps: 3}"
    whole = ranked(tmp_path / "whole", ranker)
    ranked(tmp_path / "cut", ranker, stop_after=2)
    assert ranked(tmp_path / "cut", ranker) == whole
    assert whole != untrained


def test_column_of_the_rows_ranks_without_a_model(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (ROOT / "examples" / "tiny" / "train.jsonl").read_text().splitlines()]
    difficulty = {row: (7 * row) % len(rows) for row in range(len(rows))}

    def data(missing: int | None = None) -> str:
        lines = [
            json.dumps(each | ({} if row == missing else {"difficulty": difficulty[row]}))
            for row, each in enumerate(rows)
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        return f"data.train.path={tmp_path}/rows.jsonl"

    ranker = "curriculum.ranking.ranker={kind: column, easiest: highest}"
    ranking = ranked(tmp_path / "whole", ranker, data(), by_model=False)
    assert [row for row, _ in sorted(ranking.items(), key=lambda item: item[1]["rank"])] == sorted(
        difficulty, key=lambda row: -difficulty[row]
    )
    with pytest.raises(DatasetInvalid, match="1 of 64 training rows have no difficulty"):
        ranked(tmp_path / "lacking", ranker, data(missing=5), by_model=False)


@pytest.mark.slow
def test_sampled_answers_without_repeats_rank_by_the_seed(tmp_path: Path, untrained: dict[int, dict[str, Any]]) -> None:
    published = ("curriculum.ranking.temperature=0.01", "curriculum.ranking.no_repeat_ngram=2")
    sampled = ranked(tmp_path / "sampled", *published)
    assert sampled != untrained
    assert sampled == ranked(tmp_path / "again", *published)
