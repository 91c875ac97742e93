"""Evaluations of the student while it is trained: what is measured when, and what of it the training state keeps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pocl.evaluation.answers_file import EvaluationKey
from pocl.evaluation.constant_scores import constant_metric
from pocl.evaluation.scores import Scores
from pocl.events import Evaluated, PhaseChanged, Sink
from pocl.spec import ByConvergence, DistillationSpec
from pocl.train.eta import EtaEstimator
from pocl.train.selection import VALIDATION, best_stage
from pocl.train.state import EvaluatedRows, MadeEvaluation, TrainState


class Score(Protocol):
    def __call__(self, split: str, *, sampled: bool) -> Scores:
        """Score the student on the samples that `split` names; with `sampled` also by sampled answers where the
        specification has sampling.
        """
        ...


KeepAnswers = Callable[[EvaluationKey, Scores], None]


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
    warned_metrics: set[tuple[str, str]] = field(init=False, default_factory=set)
    """Metrics with their samples that a warning has called constant."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the samples to evaluate on."""
        return () if self.scoring is None else self.scoring.splits

    @property
    def best_stage(self) -> int | None:
        """The best stage so far; None where none was scored on the validation samples."""
        return best_stage(self.state.evaluations, self.spec.evaluation.best_by)

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
        rows, evaluated = None, None
        if scores.by_row is not None:
            rows = EvaluatedRows(subject=subject, stage=stage, split=split, rows=scores.by_row)
        if scores.rows:
            evaluated = Evaluated(subject=subject, split=split, stage=stage, step=self.state.step, **scores.reported)
        self.state.add_evaluation(MadeEvaluation(rows, evaluated))
        if evaluated is not None:
            self.sink(evaluated)

    def _score(self, scoring: StudentScoring, split: str, *, sampled: bool) -> Scores:
        with self.eta.evaluation():
            scores = scoring.score(split, sampled=sampled)
        if scores.by_row is not None:
            for metric in sorted({"rouge_l", *self._steering_metrics}):
                values = getattr(scores.by_row, metric)
                warning = constant_metric(metric, values, model="student", samples=f"{split} samples")
                if warning is not None and (metric, split) not in self.warned_metrics:
                    self.warned_metrics.add((metric, split))
                    self.sink(warning)
        return scores

    @property
    def _steering_metrics(self) -> set[str]:
        """The metrics that choose the best stage and end stages."""
        advance = self.spec.curriculum.advance
        return {self.spec.evaluation.best_by, *([advance.metric] if isinstance(advance, ByConvergence) else [])}
