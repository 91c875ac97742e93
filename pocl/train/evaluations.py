"""Evaluations of the student while it is trained: what is measured when, and what of it the training state keeps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from pocl.evaluation.answers import thoughts_not_closed
from pocl.evaluation.answers_file import EvaluationKey
from pocl.evaluation.constant_scores import constant_metric
from pocl.evaluation.scores import Scores
from pocl.events import Evaluated, PhaseChanged, Sink, Warned
from pocl.spec import ByConvergence, DistillationSpec, Evaluation
from pocl.train.eta import EtaEstimator
from pocl.train.selection import VALIDATION, best_stage
from pocl.train.state import EvaluatedRows, MadeEvaluation, TrainState


class Score(Protocol):
    def __call__(self, split: str, *, sampled: bool) -> Scores:
        """Score the student on the samples that `split` names; with `sampled` also by sampled answers where the
        specification has sampling.
        """
        ...


_AFTER_EPOCH: Final = "after an epoch"
"""The kind of the evaluations after epochs, which have greedy answers alone; other kinds are named by their samples."""
KeepAnswers = Callable[[EvaluationKey, Scores], None]


def unfinished_thoughts_of(model: str, split: str, scores: Scores, evaluation: Evaluation) -> Warned | None:
    """The warning that answers of a model to the samples of an evaluation end inside their thoughts; None where none
    does.

    Args:
        model: What answered, for people.
    """
    answers = f"answers of {model} to {split} samples"
    return thoughts_not_closed(scores.in_thought, "/evaluation/max_new_tokens", evaluation.max_new_tokens, answers)


@dataclass(frozen=True)
class StudentScoring:
    """How the student is scored, and on which samples."""

    score: Score
    splits: tuple[str, ...] = (VALIDATION,)
    """The names of the samples to evaluate on."""
    keep_answers: KeepAnswers = lambda *_: None
    """Is given what each evaluation measured."""


@dataclass
class StudentEvaluations:
    """Evaluates the student, reports the scores and adds them to the training state."""

    scoring: StudentScoring | None
    """None without samples to evaluate on: nothing is evaluated then."""
    spec: DistillationSpec
    state: TrainState
    sink: Sink
    eta: EtaEstimator
    warned: set[str] = field(init=False, default_factory=set)
    """Warnings of constant metrics that were given."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the samples to evaluate on."""
        return () if self.scoring is None else self.scoring.splits

    @property
    def best_stage(self) -> int | None:
        """The best stage so far; None where none was scored on the validation samples."""
        return best_stage(self.state.evaluations, self.spec.evaluation.best_by)

    def count_left(self, *, stages: int, epochs: int) -> dict[str, int]:
        """How many evaluations of each kind there are at most until so many stages and epochs have ended."""
        if self.scoring is None:
            return {}
        # Without validation samples no stage is the best, and the others are scored after the last one alone.
        left = dict.fromkeys(self.splits, stages if VALIDATION in self.splits else 1)
        if isinstance(self.spec.curriculum.advance, ByConvergence):
            left[_AFTER_EPOCH] = epochs
        return left

    def score_initial(self) -> None:
        """Score the untrained student on all samples.

        A branch may name samples that its parent did not: the student is no longer as it was at its start.
        """
        for split in self.splits if self.state.step == 0 else ():
            self._evaluate("initial", split)

    def scores_stage(self, *, is_last: bool) -> bool:
        """Whether a stage is scored when it ends, whatever its scores are."""
        return VALIDATION in self.splits or (is_last and bool(self.splits))

    def score_stage_on_validation(self, stage: int) -> None:
        """Score the stage that has just ended on the validation samples, where there are any."""
        if VALIDATION in self.splits:
            self._evaluate("stage", VALIDATION, stage)

    def score_stage_on_others(self, stage: int, *, is_last: bool) -> None:
        """Score the stage that has just ended on all other samples if it is the best so far or the last one.

        Another machine may not have its weights any more once the run has ended.
        """
        if self.best_stage == stage or is_last:
            for split in self.splits:
                self._evaluate("stage", split, stage)
        best = self.best_stage
        # What is compared in the end; of other stages the means are enough.
        self.state.row_scores = [
            each for each in self.state.row_scores if each.subject != "stage" or each.stage in (best, stage)
        ]

    def score_epoch(self) -> float | None:
        """Score the epoch that has just ended, where its stage ends by convergence.

        Returns:
            The metric that convergence is seen by; None where no epoch is scored.
        """
        advance = self.spec.curriculum.advance
        if not isinstance(advance, ByConvergence) or self.scoring is None:
            return None
        # The greedy score decides; sampled answers would cost as much again for each seed.
        scores = self._score(self.scoring, VALIDATION, sampled=False)
        self.sink(Evaluated(subject="epoch", stage=self.state.stage, step=self.state.step, **scores.reported))
        return float(getattr(scores, advance.metric))

    def _evaluate(self, subject: Literal["initial", "stage"], split: str, stage: int | None = None) -> None:
        key = EvaluationKey(split, subject, stage)
        if self.scoring is None or key in self.state.evaluation_keys:
            return
        self.sink(PhaseChanged(phase="evaluating", stage=stage))
        scores = self._score(self.scoring, split, sampled=True)
        # The answers are whole before the event, on which they are stored.
        self.scoring.keep_answers(key, scores)
        student = "the untrained student" if stage is None else f"the student after stage {stage + 1}"
        unfinished = unfinished_thoughts_of(student, split, scores, self.spec.evaluation)
        if unfinished is not None:
            self.sink(unfinished)
        rows, evaluated = None, None
        if scores.by_row is not None:
            rows = EvaluatedRows(subject=subject, stage=stage, split=split, rows=scores.by_row)
        if scores.rows:
            evaluated = Evaluated(subject=subject, split=split, stage=stage, step=self.state.step, **scores.reported)
        self.state.add_evaluation(MadeEvaluation(rows, evaluated))
        if evaluated is not None:
            self.sink(evaluated)

    def _score(self, scoring: StudentScoring, split: str, *, sampled: bool) -> Scores:
        with self.eta.evaluation(split if sampled else _AFTER_EPOCH):
            scores = scoring.score(split, sampled=sampled)
        if scores.by_row is not None:
            for metric in sorted({"rouge_l", *self._steering_metrics}):
                values = getattr(scores.by_row, metric)
                warning = constant_metric(metric, values, model="student", samples=f"{split} samples")
                if warning is not None and warning.message not in self.warned:
                    self.warned.add(warning.message)
                    self.sink(warning)
        return scores

    @property
    def _steering_metrics(self) -> set[str]:
        """The metrics that choose the best stage and end stages."""
        advance = self.spec.curriculum.advance
        return {self.spec.evaluation.best_by, *([advance.metric] if isinstance(advance, ByConvergence) else [])}
