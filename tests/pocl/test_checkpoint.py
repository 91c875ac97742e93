"""A training state comes back as it was saved, and what grows with the samples is not in its `state.json`."""

from pathlib import Path

from pocl.evaluation.row_scores import RowScores
from pocl.export.student import StudentExport
from pocl.models.random import byte_level_tokenizer
from pocl.spec import Training
from pocl.train import checkpoint
from pocl.train.checkpoint import Student
from pocl.train.optimizer import make_optimizer
from pocl.train.state import EvaluatedRows, TrainState
from tests.pocl.tiny_models import tiny


def state_with_scores(samples: int) -> TrainState:
    rows = RowScores(
        rouge_l=(12.3456,) * samples,
        exact_match=(100.0,) * samples,
        cross_entropy=(1.234567,) * samples,
        tokens=(7,) * samples,
    )
    subjects = [EvaluatedRows(subject="initial", stage=None, split=split, rows=rows) for split in ("validation", "a")]
    return TrainState(step=samples, row_scores=subjects)


def test_scores_of_samples_come_back_and_stand_beside_the_state(tmp_path: Path) -> None:
    model = tiny("llama")
    student = Student(model, StudentExport(byte_level_tokenizer(64)), make_optimizer(model, Training()))
    sizes = []
    for samples in (1, 1000):
        state = state_with_scores(samples)
        directory = checkpoint.save(tmp_path, state, student)
        point, skipped = checkpoint.find_resume_point(tmp_path)
        assert point is not None
        assert (point.state, skipped) == (state, [])
        sizes.append((directory / "training" / "state.json").stat().st_size)
    # The digits of the step.
    assert sizes[1] - sizes[0] <= 3


def test_scores_that_are_added_to_a_checkpoint_replace_those_in_it(tmp_path: Path) -> None:
    model = tiny("llama")
    student = Student(model, StudentExport(byte_level_tokenizer(64)), make_optimizer(model, Training()))
    directory = checkpoint.save(tmp_path, TrainState(step=3), student)
    state = state_with_scores(3)
    checkpoint.add_scores(directory, state, card=None)
    point, skipped = checkpoint.find_resume_point(tmp_path)
    assert point is not None
    assert (point.state, skipped) == (state, [])


def test_scores_within_the_state_of_an_earlier_version_are_read() -> None:
    state = state_with_scores(2)
    earlier = state.model_dump(mode="json", exclude={"row_scores_digest"}) | {
        "row_scores": [each.model_dump(mode="json") for each in state.row_scores]
    }
    assert TrainState.model_validate(earlier) == state
