"""The student at its end beside the student at its start and the teacher, on the same samples."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from pocl.evaluation.intervals import ScoreDifference, score_intervals
from pocl.evaluation.row_scores import RowScores
from pocl.train.state import TrainState

Subject = Literal["teacher", "initial", "best", "final"]
_OTHERS: Final[tuple[Literal["initial", "teacher"], ...]] = ("initial", "teacher")


class ComparedAnswers(BaseModel):
    """A sample with the answers of several models to it; long texts are cut."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    split: str
    """The samples that it is one of: `validation`, `test` or the name of an evaluation set."""
    prompt: str
    """The end of the prompt."""
    reference: str | None
    """The first reference; null where the sample has none, so that its answers are not scored."""
    answers: Mapping[Subject, str]
    """The greedy answers by model: `teacher`, `initial` (the student before training), `best`, `final`."""
    unfinished_thoughts: tuple[Subject, ...] = ()
    """The models whose answer ended inside its thought, and so says nothing."""


@dataclass(frozen=True)
class ModelComparison:
    """The scores of each sample of a finished run."""

    state: TrainState
    best_stage: int | None

    def differences(self, *, seed: int) -> tuple[ScoreDifference, ...]:
        """The differences of the final student, and of the best one where it is another, from teacher and start."""
        return tuple(
            ScoreDifference(
                split=split,
                model=model,
                compared_with=other,
                metric=metric,
                difference=interval.difference,
                low=interval.low,
                high=interval.high,
                rows=len(rows[model].tokens),
            )
            for split, rows in self._by_split().items()
            for model in ("final", "best")
            for other in _OTHERS
            if model in rows and other in rows
            for metric, interval in score_intervals(rows[model], rows[other], seed=seed).items()
        )

    def answers(self) -> tuple[ComparedAnswers, ...]:
        """The answers to the first samples of each set."""
        return tuple(
            ComparedAnswers(
                split=split,
                prompt=sample.prompt,
                reference=sample.reference,
                answers={subject: each.shown[index].answer for subject, each in rows.items()},
                unfinished_thoughts=tuple(
                    subject for subject, each in rows.items() if each.shown[index].unfinished_thought
                ),
            )
            for split, rows in self._by_split().items()
            for index, sample in enumerate(rows["final"].shown if "final" in rows else ())
        )

    def _by_split(self) -> dict[str, dict[Subject, RowScores]]:
        """The scores of the samples by the name of their set and the model."""
        last = self.state.stage - 1
        by_split: dict[str, dict[Subject, RowScores]] = {}
        for each in self.state.row_scores:
            rows = by_split.setdefault(each.split, {})
            if each.subject != "stage":
                rows[each.subject] = each.rows
            elif each.stage == last:
                rows["final"] = each.rows
            elif each.stage == self.best_stage:
                rows["best"] = each.rows
        return by_split
