"""The phase `evaluating`: the teacher once, and the student whenever training asks for it."""

from collections.abc import Set
from dataclasses import dataclass

from pocl.callbacks import throttle
from pocl.evaluation.answers_file import AnswersFile, EvaluationKey
from pocl.evaluation.constant_scores import constant_metric
from pocl.evaluation.evaluator import Evaluator
from pocl.evaluation.scores import Scores
from pocl.events import Evaluated, PhaseChanged
from pocl.layout import ANSWERS_FILE
from pocl.models.loading import LazyModel
from pocl.out_of_memory import retry_halved
from pocl.pipeline.context import RunContext
from pocl.pipeline.generation import generation_settings, scoring_sizes
from pocl.pipeline.load import LoadedRun
from pocl.teacher.signal import TeacherSignal
from pocl.train.evaluations import unfinished_thoughts_of
from pocl.train.state import EvaluatedRows, MadeEvaluation


@dataclass(frozen=True)
class RunEvaluations:
    """Scores the models of a run on its held-out samples, and keeps their answers in `answers.jsonl`."""

    context: RunContext
    run: LoadedRun

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the held-out samples."""
        return tuple(self.run.corpus.held_out)

    def score_teacher(self, made: Set[EvaluationKey]) -> list[MadeEvaluation]:
        """The evaluations of the teacher that the specification asks for and that are not `made` yet.

        Raises:
            LossDiverged, RunStopped, OutOfMemory: as of the evaluation.
        """
        teacher = self.run.models.teacher
        if teacher is None or not self.context.spec.evaluation.teacher:
            return []
        missing = [split for split in self.splits if EvaluationKey(split, "teacher", None) not in made]
        return [self._score_teacher_on(split, teacher) for split in missing]

    def score_student(self, teacher: TeacherSignal | None, split: str, *, sampled: bool) -> Scores:
        """Score the student as it is now, as :class:`pocl.train.evaluations.Score` says."""

        def score() -> Scores:
            with self.run.models.product_weights.in_use():
                return self._evaluator(split).score(self.run.models.student.model, teacher, sampled=sampled)

        return retry_halved(score, self.context.halve)

    def keep_answers(self, key: EvaluationKey, scores: Scores) -> None:
        """Keep the answers of an evaluation.

        Raises:
            DiskFull: there is no space; the file has its old content.
        """
        self._answers_file.add(key, self.run.corpus.held_out[key.split], scores)

    def drop_answers_but_of(self, evaluations: Set[EvaluationKey]) -> None:
        """Drop the answers of evaluations that the training state lacks: they are made anew."""
        self._answers_file.keep_only(evaluations)

    def _score_teacher_on(self, split: str, teacher: LazyModel) -> MadeEvaluation:
        context = self.context
        context.sink(PhaseChanged(phase="evaluating"))
        scores = retry_halved(
            lambda: self._evaluator(split).score_teacher(teacher, context.shared_cache), context.halve
        )
        assert scores.by_row is not None  # As whatever the evaluator scores.
        self.keep_answers(EvaluationKey(split, "teacher", None), scores)
        rows = EvaluatedRows(subject="teacher", stage=None, split=split, rows=scores.by_row)
        unfinished = unfinished_thoughts_of("the teacher", split, scores, context.spec.evaluation)
        if unfinished is not None:
            context.sink(unfinished)
        if not scores.rows:
            return MadeEvaluation(rows, None)
        evaluated = Evaluated(subject="teacher", split=split, **scores.reported)
        context.sink(evaluated)
        warning = constant_metric("rouge_l", scores.by_row.rouge_l, model="teacher", samples=f"{split} samples")
        if warning is not None:
            context.sink(warning)
        return MadeEvaluation(rows, evaluated)

    @property
    def _answers_file(self) -> AnswersFile:
        return AnswersFile(self.context.workdir / ANSWERS_FILE)

    def _evaluator(self, split: str) -> Evaluator:
        context, models, corpus = self.context, self.run.models, self.run.corpus
        evaluation = context.spec.evaluation
        return Evaluator(
            corpus.held_out[split],
            models.tokenizer,
            generation_settings(
                context, corpus.ending, max_new_tokens=evaluation.max_new_tokens, sampling=evaluation.sampling
            ),
            scoring_sizes(context),
            shared_vocabulary=models.shared_vocabulary,
            on_progress=throttle(context.progress("evaluating", "rows")),
            should_stop=context.host.should_stop,
        )
