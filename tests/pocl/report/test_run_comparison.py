"""A control beside the run that it is compared with: what is read of the files of both, and what is said of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pocl.layout import ANSWERS_FILE, COMPARED_DIR, RESULT_FILE, ExitCode
from pocl.report.conclusions import describe_conclusions
from pocl.report.run_comparison import RunComparison, RunDifference, compare_with_run
from tests.pocl.report.test_conclusions import SCORES

ROWS = 40
OURS = np.random.default_rng(1).uniform(0, 50, ROWS)
THEIRS = np.random.default_rng(2).uniform(0, 100, ROWS)
FINAL: dict[str, Any] = {
    "subject": "final", "stage": None, "split": "validation", "rows": ROWS, "rouge_l": float(THEIRS.mean()),
    "exact_match": 0.0, "cross_entropy": 2.0,
}  # fmt: skip


def answers(scores: NDArray[np.float64], *, stage: int = 1, split: str = "validation", sample: str = "s") -> list[str]:
    """The lines of an evaluation, by sample."""
    return [
        json.dumps(
            {
                "split": split, "subject": "stage", "stage": stage, "row": row, "sample": f"{sample}{row}",
                "answer": "An answer.", "rouge_l": float(score),
            }
        )
        for row, score in enumerate(scores)
    ]  # fmt: skip


def write(workdir: Path, ours: list[str], theirs: list[str], result: Any = None) -> Path:
    compared = workdir / COMPARED_DIR
    compared.mkdir()
    (workdir / ANSWERS_FILE).write_text("\n".join(ours))
    (compared / ANSWERS_FILE).write_text("\n".join(theirs))
    (compared / RESULT_FILE).write_text(json.dumps({"evaluations": [FINAL]} if result is None else result))
    return workdir


def test_the_difference_is_that_of_the_last_stages_on_the_same_samples(tmp_path: Path) -> None:
    # Its first stage scored otherwise, and so did it on other samples.
    theirs = [*answers(THEIRS + 30, stage=0), *answers(THEIRS), *answers(THEIRS + 30, split="else")]
    comparison = compare_with_run(write(tmp_path, answers(OURS, stage=0), theirs), seed=3)
    assert comparison is not None
    assert [each.model_dump(include=set(FINAL)) for each in comparison.evaluations] == [FINAL]
    (difference,) = comparison.differences
    gaps = THEIRS - OURS
    assert difference.difference == pytest.approx(gaps.mean(), abs=1e-9)
    assert (difference.split, difference.rows) == ("validation", ROWS)
    # The standard error of a mean of independent gaps, of which the bootstrap's is an estimate.
    error = gaps.std(ddof=1) / np.sqrt(ROWS)
    assert difference.high - difference.low == pytest.approx(2 * 1.96 * error, rel=0.15)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param(answers(OURS), answers(THEIRS, sample="another "), id="other samples"),
        pytest.param(answers(OURS[:9]), answers(THEIRS), id="too few"),
        pytest.param(answers(OURS), [], id="no answers"),
    ],
)
def test_where_samples_differ_there_is_no_interval(tmp_path: Path, ours: list[str], theirs: list[str]) -> None:
    comparison = compare_with_run(write(tmp_path, ours, theirs), seed=3)
    assert comparison is not None
    assert comparison.differences == ()


@pytest.mark.parametrize("result", [[], {"evaluations": 1}, {"evaluations": [{"subject": "final"}]}, "final"], ids=str)
def test_a_damaged_result_is_no_comparison(tmp_path: Path, result: Any) -> None:
    assert compare_with_run(write(tmp_path, answers(OURS), answers(THEIRS), result), seed=3) is None


def test_files_that_are_gone_are_no_comparison(tmp_path: Path) -> None:
    (write(tmp_path, answers(OURS), answers(THEIRS)) / COMPARED_DIR / ANSWERS_FILE).unlink()
    assert compare_with_run(tmp_path, seed=3) is None


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.0, 3.0, ("2.00 points of ROUGE-L above", "leaves out helped")),
        (-3.0, -1.0, ("2.00 points of ROUGE-L below", "leaves out did harm")),
        (-1.0, 3.0, ("1.00 points of ROUGE-L above", "may make no difference")),
    ],
)
def test_what_is_said_follows_from_the_interval(low: float, high: float, words: tuple[str, str]) -> None:
    difference = RunDifference(split="validation", difference=(low + high) / 2, low=low, high=high, rows=64)
    comparison = RunComparison(evaluations=(), differences=(difference,))
    (first, *_) = describe_conclusions(SCORES, [], 0, is_control=True, compared_with=comparison)
    assert all(each in first for each in words)


@pytest.mark.system
def test_a_run_that_has_not_finished_is_refused_before_anything_starts(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("teacher: {random: {}}\nstudent: {random: {}}\ndata: {train: {path: train.jsonl}}\n")
    arguments = ("run", str(spec), "--workdir", str(tmp_path / "run"), "--compared-with", str(tmp_path))
    ended = subprocess.run([sys.executable, "-m", "pocl", *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == ExitCode.USAGE
    assert ended.stderr == f"--compared-with {tmp_path}: No such file or directory\n"
