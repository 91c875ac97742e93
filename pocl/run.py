"""The only door to the engine: run a specification in a directory, or continue what the directory holds."""

import math
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers

from pocl.curriculum.difficulty import RankedSample, RankingCacheKey, load_or_rank
from pocl.curriculum.journal import DifficultyMeasurement, Journal
from pocl.curriculum.measure import measure
from pocl.errors import DiskFull, EngineFailure, LossDiverged, OutOfMemory, PoclError, is_disk_full
from pocl.evaluation.evaluate import (
    EncodedDataset,
    GenerationSettings,
    ScoreCacheKey,
    Scores,
    evaluate,
    load_or_score,
    stop_token_ids,
)
from pocl.events import (
    ArtifactWritten,
    CheckpointSaved,
    Evaluated,
    Event,
    Phase,
    PhaseChanged,
    Progressed,
    RunEnded,
    RunFinished,
    RunStarted,
    Sink,
    StepLogged,
    Warned,
)
from pocl.layout import (
    CACHE_DIR,
    CHECKPOINTS_DIR,
    EVENTS_FILE,
    FINAL_DIR,
    RANKING_FILE,
    REPORT_FILE,
    RESULT_FILE,
    SPEC_FILE,
    checkpoint_dir,
)
from pocl.models.loading import LoadedModel, load_weights
from pocl.models.packed import can_pack
from pocl.models.precision import choose_device, choose_precision, machine_fingerprint
from pocl.plan import StagePlan, stage_table
from pocl.prepare import Corpus, Models, dataset_digest, encode_corpus, load_models, read_splits, references_digest
from pocl.progress import throttle
from pocl.report.result import Result, build_result, write_result
from pocl.spec import DistillationSpec
from pocl.storage.manifest import read_manifest
from pocl.storage.shared_cache import SharedCache
from pocl.storage.workdir import EventLog, locked, pin_spec
from pocl.teacher.cache import open_teacher
from pocl.teacher.distillation_loss import training_loss
from pocl.teacher.signal import LiveTeacher, TeacherSignal
from pocl.train import checkpoint
from pocl.train.checkpoint import ResumePoint, TrainState
from pocl.train.loop import Score, Student, Trainer, make_optimizer

DEFAULT_CACHE_BYTES = 64 << 30
_PROGRESS_SECONDS = 1.0
ShouldStop = Callable[[], bool]


def run(
    spec: DistillationSpec,
    workdir: Path,
    sink: Sink,
    should_stop: ShouldStop = lambda: False,
    reuse: SharedCache | None = None,
    should_pause: ShouldStop = lambda: False,
) -> Result:
    """Distil as `spec` says, in `workdir`, or continue the run that `workdir` holds.

    Args:
        sink: Is given every event.
        should_stop: Asked between steps and answers; once it is true the training state is saved and
            :class:`~pocl.errors.RunStopped` is raised.
        should_pause: Asked at the end of each stage but the last; once it is true the run stops there, as above.
        reuse: Where the teacher's hidden states and rankings are kept for other runs; below `workdir` unless given.

    Raises:
        PoclError: whose class says what went wrong. The last event is then a `RunEnded` with the same code.
    """
    last_step = _LastStep(sink)
    reuse = reuse or SharedCache(workdir / CACHE_DIR, DEFAULT_CACHE_BYTES)
    with ExitStack() as held:
        try:
            held.enter_context(locked(workdir))
            last_step.onward = held.enter_context(EventLog(workdir / EVENTS_FILE, sink))
            result = _Run(spec, workdir, last_step, _Asked(should_stop, should_pause), reuse, held).distil()
            reuse.unpin()
            return result
        except Exception as error:
            # Every end is reported under a code before it leaves, to whoever still listens.
            typed = _typed(error)
            if not typed.retryable:
                reuse.unpin()
            with suppress(OSError):
                last_step(
                    RunEnded(
                        code=typed.code,
                        message=typed.message,
                        fault=typed.fault,
                        retryable=typed.retryable,
                        hint=typed.hint,
                        step=last_step.step,
                    )
                )
            if typed is error:
                raise
            raise typed from error


@dataclass(frozen=True)
class _Asked:
    """What the caller may ask of a run."""

    to_stop: ShouldStop
    to_pause: ShouldStop


class _LastStep:
    """A sink that remembers how far training came."""

    def __init__(self, onward: Sink) -> None:
        self.onward = onward
        self.step = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepLogged):
            self.step = event.step
        self.onward(event)


class _Run:
    """One run of one specification, told in the order in which it happens."""

    def __init__(
        self,
        spec: DistillationSpec,
        workdir: Path,
        sink: Sink,
        asked: _Asked,
        reuse: SharedCache,
        held: ExitStack,
    ) -> None:
        self._spec = pin_spec(workdir, spec, _with_choices(spec))
        self._workdir = workdir
        self._sink = sink
        self._should_stop = asked.to_stop
        self._should_pause = asked.to_pause
        self._reuse = reuse
        self._held = held
        """What must be let go of when the run ends."""
        torch.set_num_threads(self._spec.resources.threads or 1)
        # Its bars would fill a log file; the events say how far a run is.
        transformers.utils.logging.disable_progress_bar()
        self._device = choose_device(self._spec.resources.device)
        self._precision = choose_precision(self._spec.training.precision, self._device)
        sink(ArtifactWritten(kind="spec", path=SPEC_FILE))

    def distil(self) -> Result:
        self._sink(PhaseChanged(phase="validating"))
        train_samples, validation_samples = read_splits(self._spec)
        table = stage_table(self._spec, len(train_samples))
        restored = self._restored()
        self._sink(
            RunStarted(
                resumed_from_step=None if restored is None else restored.state.step,
                total_steps=table[-1].first_step + table[-1].steps,
                stages=len(table),
            )
        )
        self._sink(PhaseChanged(phase="loading"))
        models = load_models(self._spec, device=self._device, precision=self._precision)
        corpus = encode_corpus(self._spec.data, models, train_samples, validation_samples)
        ranking = self._rank(models, corpus)
        of_teacher = None if restored is not None else self._score_teacher(models, corpus)
        teacher = self._teacher(models, corpus)
        if models.teacher is not None and teacher is not None:
            # A cached teacher needs its layers no more: the memory goes to the student.
            models = replace(models, teacher=replace(models.teacher, model=teacher.model))
        trainer = self._trainer(models, corpus, ranking, table, restored, teacher)
        if of_teacher is not None:
            trainer.state.evaluations.append(of_teacher)
        state = trainer.run()
        return self._export(models, state, table, ranking)

    def _restored(self) -> ResumePoint | None:
        restored, passed = checkpoint.find_resume_point(self._workdir / CHECKPOINTS_DIR)
        for sentence in passed:
            self._sink(Warned(code="checkpoint_passed_over", message=sentence))
        if restored is None and passed:
            self._sink(Warned(code="started_again", message="no whole checkpoint is left: starting again from step 0"))
        if restored is not None and restored.state.machine != machine_fingerprint(self._device):
            message = f"continued on another machine, so not to the same bits: {machine_fingerprint(self._device)}"
            self._sink(Warned(code="not_exact", message=message))
        return restored

    # --- Ranking, training, exporting ------------------------------------------------------------------

    def _rank(self, models: Models, corpus: Corpus) -> list[RankedSample]:
        """The student as it starts ranks the training samples; a ranking of the same inputs is taken over."""
        self._sink(PhaseChanged(phase="ranking"))
        inputs = self._ranking_inputs(models, corpus)
        measured = partial(self._measure, models, corpus)
        ranking, found = load_or_rank(self._workdir, inputs, measured, self._reuse)
        if not found:
            self._sink(ArtifactWritten(kind="ranking", path=RANKING_FILE))
        return ranking

    def _ranking_inputs(self, models: Models, corpus: Corpus) -> RankingCacheKey:
        generation = self._ranking_answers(corpus)
        return RankingCacheKey(
            student=models.student.digest,
            data=dataset_digest(corpus.train),
            template=corpus.template,
            end_ids=tuple(sorted(stop_token_ids(models.student.model, models.tokenizer, generation))),
            rrf_k=self._spec.curriculum.ranking.rrf_k,
            max_new_tokens=generation.max_new_tokens,
            batch_size=generation.batch_size,
            precision=self._precision.name,
            machine=machine_fingerprint(self._device),
        )

    def _ranking_answers(self, corpus: Corpus) -> GenerationSettings:
        spec = self._spec
        return GenerationSettings(
            spec.curriculum.ranking.max_new_tokens, spec.evaluation.batch_size, end_id=corpus.end_id
        )

    def _measure(self, models: Models, corpus: Corpus, journal: Journal) -> list[DifficultyMeasurement]:
        return measure(
            models.student.model,
            models.tokenizer,
            corpus.train,
            journal,
            generation=self._ranking_answers(corpus),
            precision=self._precision,
            on_progress=self._progress("ranking", "samples"),
            should_stop=self._should_stop,
        )

    def _teacher(self, models: Models, corpus: Corpus) -> TeacherSignal | None:
        """The teacher for every row that will be asked about, computed before where there is room."""
        if models.teacher is None:
            return None
        trained_on = corpus.train.samples if self._spec.method.needs_teacher else ()
        scored_on = () if corpus.validation is None else corpus.validation.samples
        self._sink(PhaseChanged(phase="caching_teacher"))
        opened = open_teacher(
            LiveTeacher(models.teacher.model, self._precision),
            models.teacher.digest,
            (*trained_on, *scored_on),
            shared_cache=self._reuse,
            sink=self._sink,
            should_stop=self._should_stop,
        )
        return self._held.enter_context(opened)

    def _trainer(
        self,
        models: Models,
        corpus: Corpus,
        ranking: list[RankedSample],
        table: tuple[StagePlan, ...],
        restored: ResumePoint | None,
        teacher: TeacherSignal | None,
    ) -> Trainer:
        model, training = models.student.model, self._spec.training
        optimizer = make_optimizer(model, training)
        cached = not isinstance(teacher, LiveTeacher)
        if restored is None:
            # Dropout draws from here on; until then loading may have drawn any number of times.
            torch.manual_seed(self._spec.seed)
            state = TrainState(
                micro_batch_size=training.micro_batch_size or 1, machine=machine_fingerprint(self._device)
            )
        else:
            state = restored.state
            load_weights(model, restored.directory)
            checkpoint.restore_optimizer(restored.directory, model, optimizer)
            if state.cached_teacher != cached:
                message = f"continued with the teacher {'cached' if cached else 'live'}, so not to the same bits"
                self._sink(Warned(code="not_exact", message=message))
        state.cached_teacher = cached
        loss = training_loss(
            model,
            teacher,
            self._spec.method,
            shared_vocabulary=models.shared_vocabulary,
            precision=self._precision,
        )
        return Trainer(
            spec=self._spec,
            table=table,
            rows=[corpus.train.samples[sample.row] for sample in ranking],
            student=Student(model, models.tokenizer, optimizer),
            training_loss=loss,
            packed=loss.is_fused and can_pack(model, self._spec.data.max_length),
            workdir=self._workdir,
            sink=self._sink,
            should_stop=self._should_stop,
            should_pause=self._should_pause,
            score=self._scorer(models, corpus, teacher),
            state=state,
        )

    def _scorer(self, models: Models, corpus: Corpus, teacher: TeacherSignal | None) -> Score | None:
        if corpus.validation is None:
            return None
        return partial(self._score, models.student, models, corpus, corpus.validation, teacher)

    def _score_teacher(self, models: Models, corpus: Corpus) -> Evaluated | None:
        """The teacher's own scores, from another run where one has them."""
        if corpus.validation is None or models.teacher is None or not self._spec.evaluation.teacher:
            return None
        self._sink(PhaseChanged(phase="evaluating"))
        generation = self._scoring_answers(corpus)
        inputs = ScoreCacheKey(
            model=models.teacher.digest,
            data=dataset_digest(corpus.validation),
            references=references_digest(corpus.validation),
            end_ids=tuple(sorted(stop_token_ids(models.teacher.model, models.tokenizer, generation))),
            max_new_tokens=generation.max_new_tokens,
            batch_size=generation.batch_size,
            sampling=self._spec.evaluation.sampling,
            precision=self._precision.name,
            machine=machine_fingerprint(self._device),
        )
        scores = load_or_score(
            self._reuse, inputs, partial(self._score, models.teacher, models, corpus, corpus.validation, None)
        )
        evaluated = Evaluated(subject="teacher", **asdict(scores))
        self._sink(evaluated)
        return evaluated

    def _score(
        self,
        loaded: LoadedModel,
        models: Models,
        corpus: Corpus,
        rows: EncodedDataset,
        teacher: TeacherSignal | None,
        *,
        sampled: bool = True,
    ) -> Scores:
        scores = evaluate(
            loaded.model,
            models.tokenizer,
            rows,
            generation=self._scoring_answers(corpus),
            precision=self._precision,
            sampling=self._spec.evaluation.sampling if sampled else None,
            teacher=teacher,
            shared_vocabulary=models.shared_vocabulary,
            on_progress=self._progress("evaluating", "rows"),
            should_stop=self._should_stop,
        )
        if not math.isfinite(scores.cross_entropy + (scores.divergence or 0.0)):
            raise LossDiverged("the loss on the validation rows is not finite")
        return scores

    def _scoring_answers(self, corpus: Corpus) -> GenerationSettings:
        evaluation = self._spec.evaluation
        return GenerationSettings(evaluation.max_new_tokens, evaluation.batch_size, end_id=corpus.end_id)

    def _export(
        self, models: Models, state: TrainState, table: tuple[StagePlan, ...], ranking: list[RankedSample]
    ) -> Result:
        self._sink(PhaseChanged(phase="exporting"))
        source = self._workdir / checkpoint_dir(state.step)
        checkpoint.link_weights(source, self._workdir / FINAL_DIR)
        final = [each.model_copy(update={"subject": "final", "stage": None}) for each in state.evaluations[-1:]]
        for each in final:
            self._sink(each)
        evaluations = [*state.evaluations, *final]
        result = build_result(state, table, evaluations, models=models, spec=self._spec, precision=self._precision.name)
        write_result(self._workdir, self._spec, result, state.metrics, ranking)
        self._sink(ArtifactWritten(kind="result", path=RESULT_FILE))
        self._sink(ArtifactWritten(kind="report", path=REPORT_FILE))
        size = read_manifest(self._workdir / FINAL_DIR).size_bytes
        self._sink(CheckpointSaved(kind="final", path=FINAL_DIR, step=state.step, stage=None, size_bytes=size))
        self._sink(RunFinished(step=state.step))
        return result

    # --- Small things ----------------------------------------------------------------------------------

    def _progress(self, phase: Phase, unit: Literal["samples", "rows"]) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            self._sink(Progressed(phase=phase, done=done, total=total, unit=unit))

        return throttle(_PROGRESS_SECONDS, report)


def _with_choices(spec: DistillationSpec) -> DistillationSpec:
    """Name what the client left to the engine: threads and micro-batch."""
    threads = spec.resources.threads or len(os.sched_getaffinity(0))
    rows = spec.training.micro_batch_size or spec.training.batch_size
    return spec.model_copy(
        update={
            "resources": spec.resources.model_copy(update={"threads": threads}),
            "training": spec.training.model_copy(update={"micro_batch_size": rows}),
        }
    )


def _typed(error: Exception) -> PoclError:
    """The engine error that an exception comes down to."""
    if isinstance(error, PoclError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OutOfMemory()
    if is_disk_full(error):
        return DiskFull()
    # The message may name paths and stays in the log; the class is safe to show.
    return EngineFailure(f"the engine failed unexpectedly ({type(error).__name__})")
