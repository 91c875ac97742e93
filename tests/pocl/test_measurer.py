"""The measurer answers only what no other run has answered, and what it measures does not depend on that."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pocl.curriculum.journal import DifficultyMeasurement, Journal
from pocl.curriculum.measurer import DifficultyMeasurer, MeasuredModel
from pocl.data.batches import EncodedSample
from pocl.evaluation.answers import GenerationSettings
from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.token_scores import ScoringSizes
from pocl.models.precision import Precision
from pocl.models.random import byte_level_tokenizer
from tests.pocl.tiny_models import VOCABULARY, tiny

FP32 = Precision("fp32", torch.device("cpu"))


def encoded_sample(number: int) -> EncodedSample:
    ids = torch.randint(3, VOCABULARY, (8 + number,), generator=torch.Generator().manual_seed(number)).tolist()
    return EncodedSample(f"{number:064x}", tuple(ids), 4 + number % 3)


def measurer_of(numbers: Sequence[int], reports: list[tuple[int, int]]) -> DifficultyMeasurer:
    tokenizer = byte_level_tokenizer(64)
    model = tiny("llama")
    return DifficultyMeasurer(
        MeasuredModel("s", model, lambda: nullcontext(model)),
        tokenizer,
        EncodedDataset(tuple(map(encoded_sample, numbers)), tuple((f"{number}",) for number in numbers)),
        template="plain",
        rrf_k=60,
        generation=GenerationSettings(2, 2, end_of_response_id=1, precision=FP32),
        sampler=None,
        scoring=ScoringSizes(tokens=32, chunk_tokens=8),
        on_progress=lambda done, total: reports.append((done, total)),
        should_stop=lambda: False,
    )


def test_reused_samples_are_not_measured_and_the_others_are_as_alone(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    measurer = measurer_of(range(7), reports)
    other_run = [DifficultyMeasurement(row, "d", 1.0, 2.0, "of another run") for row in (1, 4, 6)]
    with Journal(tmp_path / "journal", "k") as journal:
        journal.reuse(other_run)
        measured = {each.row: each for each in measurer.measure(journal)}
    assert sorted(measured) == list(range(7))
    assert [measured[row] for row in (1, 4, 6)] == other_run
    assert reports[-1] == (7, 7)
    alone = measurer_of([0, 2, 3, 5], [])
    with Journal(tmp_path / "alone", "k") as journal:
        for each in alone.measure(journal):
            row = [0, 2, 3, 5][each.row]
            assert replace(each, row=row) == measured[row]


def test_a_run_that_reuses_everything_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measurer = measurer_of(range(3), [])
    monkeypatch.setattr(type(measurer.ranker.structure), "forward", lambda *_args, **_options: pytest.fail("ran"))
    other_run = [DifficultyMeasurement(row, "d", 1.0, 2.0, "r") for row in range(3)]
    with Journal(tmp_path / "journal", "k") as journal:
        journal.reuse(other_run)
        assert measurer.measure(journal) == other_run
