"""Commands at the smallest sizes: they finish, and all rivals compute the same."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.generate import countdown_prompts, ours, theirs
from bench.rouge import answer_pairs
from bench.rouge import ours as our_scores
from bench.rouge import theirs as their_scores
from bench.sizes import SIZES, build_model, llama, set_mode
from pocl.models.precision import Precision, choose_device

ROOT = Path(__file__).resolve().parents[2]
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL comes with the extra `bench`")


def bench(*arguments: str) -> str:
    """The output of `python -m bench`, in a process of its own because it pins its cores."""
    finished = subprocess.run(
        [sys.executable, "-m", "bench", *arguments, "--threads", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return finished.stdout


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_of_rivals_are_equal_and_of_the_requested_length(batch_size: int) -> None:
    size, precision = SIZES["tiny"], Precision("fp32", choose_device("cpu"))
    model = set_mode(build_model(llama(size.student, size.vocabulary)), train=False)
    prompts, tokens = countdown_prompts(4, size.vocabulary)
    answers = ours(model, prompts, batch_size, precision)
    assert answers == theirs(model, prompts, batch_size, precision)
    assert sum(map(len, answers)) == tokens
    assert len(set(map(len, answers))) > 1


def test_scores_of_rivals_are_equal() -> None:
    answers = answer_pairs(20)
    assert our_scores(answers) == their_scores(answers)


@needs_trl
@pytest.mark.slow
def test_losses_of_rivals_are_equal(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    printed = bench(
        "step", "--size", "tiny", "--rows", "2", "--rounds", "1", "--no-memory", "--dtype", "fp32", "--json", str(file)
    )
    record = json.loads(file.read_text())
    assert next(iter(record["results"]))["name"] == "ours"
    assert all(value < 1e-4 for value in record["checks"].values())
    assert "matrix peak of this run" in printed
