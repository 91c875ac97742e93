"""The phases of one run, in the order in which they happen."""

import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
import transformers

from pocl.callbacks import OnProgress, ShouldStop
from pocl.curriculum.measurer import DifficultyMeasurer
from pocl.curriculum.ranking import RankedSample, load_or_rank
from pocl.data.batches import EncodedSample
from pocl.evaluation.answers import GenerationSettings
from pocl.evaluation.evaluator import Evaluator
from pocl.evaluation.scores import Scores
from pocl.events import (
    ArtifactWritten,
    CheckpointSaved,
    Evaluated,
    Phase,
    PhaseChanged,
    Progressed,
    RunFinished,
    RunStarted,
    Sink,
    Warned,
)
from pocl.layout import (
    CHECKPOINTS_DIR,
    FINAL_DIR,
    MODEL_DIGESTS_FILE,
    RANKING_FILE,
    REPORT_FILE,
    RESULT_FILE,
    SPEC_FILE,
    checkpoint_dir,
)
from pocl.losses.buffers import LossExecution
from pocl.models.digest import DigestStore
from pocl.models.loading import load_weights
from pocl.models.packed import can_pack
from pocl.models.precision import choose_device, choose_precision, machine_fingerprint
from pocl.plan import StagePlan, stage_table
from pocl.prepare import Corpus, Models, encode_corpus, load_models, read_splits
from pocl.report.result import Result, build_result, write_result
from pocl.sizes import Sizes, choose_sizes
from pocl.spec import DistillationSpec
from pocl.storage.manifest import read_manifest
from pocl.storage.shared_cache import SharedCache
from pocl.storage.workdir import pin_again, pin_spec
from pocl.teacher.cache import CachedTeacher, open_teacher
from pocl.teacher.distillation_loss import training_loss
from pocl.teacher.signal import LiveTeacher, TeacherSignal, TeacherSource
from pocl.train import checkpoint
from pocl.train.checkpoint import ResumePoint, TrainState
from pocl.train.loop import Student, Trainer, make_optimizer


class Pipeline:
    """One run of one specification: validate, load, rank, cache the teacher, train, evaluate and export."""

    def __init__(
        self,
        spec: DistillationSpec,
        workdir: Path,
        sink: Sink,
        *,
        should_stop: ShouldStop,
        should_pause: ShouldStop,
        shared_cache: SharedCache,
        resources: ExitStack,
    ) -> None:
        """Pin the specification in `workdir`, and set up threads, device and precision.

        Args:
            resources: Is given what must be released when the run ends.
        """
        self._spec = pin_spec(workdir, spec, spec.with_choices(_choices_at_start(spec)))
        self._workdir = workdir
        self._sink = sink
        self._should_stop = should_stop
        self._should_pause = should_pause
        self._shared_cache = shared_cache
        self._resources = resources
        torch.set_num_threads(self._spec.resources.threads or 1)
        # Progress bars would fill a log file; the events say how far a run is.
        transformers.utils.logging.disable_progress_bar()
        self._device = choose_device(self._spec.resources.device)
        self._precision = choose_precision(self._spec.training.precision, self._device)
        sink(ArtifactWritten(kind="spec", path=SPEC_FILE))

    def run(self) -> Result:
        """Do what is left of the run.

        Raises:
            PoclError: whose class says what went wrong.
        """
        self._sink(PhaseChanged(phase="validating"))
        train_samples, validation_samples = read_splits(self._spec)
        table = stage_table(self._spec, len(train_samples))
        resume_point = self._find_resume_point()
        self._sink(
            RunStarted(
                resumed_from_step=None if resume_point is None else resume_point.state.step,
                total_steps=table[-1].first_step + table[-1].steps,
                stages=len(table),
            )
        )
        self._sink(PhaseChanged(phase="loading"))
        digests = DigestStore(self._shared_cache.root / MODEL_DIGESTS_FILE)
        models = load_models(self._spec, device=self._device, precision=self._precision, digests=digests)
        self._pin_sizes()
        corpus = encode_corpus(self._spec.data, models, train_samples, validation_samples)
        evaluator = self._evaluator(models, corpus)
        ranking = self._rank(models, corpus)
        teacher_scores = [] if resume_point is not None else self._score_teacher(models, evaluator)
        teacher = self._open_teacher(models, corpus, resume_point)
        if models.teacher is not None:
            # A cached teacher needs its layers no more: the memory goes to the student.
            models.teacher.release()
        training_samples = [corpus.train.samples[sample.row] for sample in ranking]
        trainer = self._trainer(models, training_samples, table, resume_point, teacher, evaluator)
        trainer.state.evaluations += teacher_scores
        state = trainer.run()
        return self._export(models, state, ranking)

    def _find_resume_point(self) -> ResumePoint | None:
        resume_point, damaged = checkpoint.find_resume_point(self._workdir / CHECKPOINTS_DIR)
        for sentence in damaged:
            self._sink(Warned(code="checkpoint_passed_over", message=sentence))
        if resume_point is None and damaged:
            self._sink(Warned(code="started_again", message="no whole checkpoint is left: starting again from step 0"))
        if resume_point is not None and resume_point.state.machine != machine_fingerprint(self._device):
            message = f"continued on another machine, so not to the same bits: {machine_fingerprint(self._device)}"
            self._sink(Warned(code="not_exact", message=message))
        return resume_point

    @property
    def _sizes(self) -> Sizes:
        return Sizes.pinned_in(self._spec)

    def _pin_sizes(self) -> None:
        """Choose and pin those sizes that are neither posted nor pinned already."""
        spec = self._spec.with_choices(choose_sizes().choices)
        if spec != self._spec:
            pin_again(self._workdir, spec)
            self._spec = spec
            self._sink(ArtifactWritten(kind="spec", path=SPEC_FILE))

    def _evaluator(self, models: Models, corpus: Corpus) -> Evaluator | None:
        if corpus.validation is None:
            return None
        evaluation = self._spec.evaluation
        return Evaluator(
            corpus.validation,
            models.tokenizer,
            GenerationSettings(
                evaluation.max_new_tokens,
                self._sizes.generation_rows,
                end_of_response_id=corpus.end_of_response_id,
                precision=self._precision,
                sampling=evaluation.sampling,
            ),
            shared_vocabulary=models.shared_vocabulary,
            on_progress=self._progress("evaluating", "rows"),
            should_stop=self._should_stop,
        )

    def _rank(self, models: Models, corpus: Corpus) -> list[RankedSample]:
        """Rank the training samples by their difficulty for the untrained student, or load an equal ranking."""
        self._sink(PhaseChanged(phase="ranking"))
        spec = self._spec
        measurer = DifficultyMeasurer(
            models.student,
            models.tokenizer,
            corpus.train,
            template=corpus.template,
            rrf_k=spec.curriculum.ranking.rrf_k,
            generation=GenerationSettings(
                spec.curriculum.ranking.max_new_tokens,
                self._sizes.generation_rows,
                end_of_response_id=corpus.end_of_response_id,
                precision=self._precision,
            ),
            on_progress=self._progress("ranking", "samples"),
            should_stop=self._should_stop,
        )
        with models.product_weights.in_use():
            ranking, was_here = load_or_rank(
                self._workdir,
                measurer.cache_key,
                corpus.train.sample_digests,
                measurer.measure,
                self._shared_cache,
            )
        if not was_here:
            self._sink(ArtifactWritten(kind="ranking", path=RANKING_FILE))
        return ranking

    def _score_teacher(self, models: Models, evaluator: Evaluator | None) -> list[Evaluated]:
        """The evaluation of the teacher, where the specification asks for one."""
        if evaluator is None or models.teacher is None or not self._spec.evaluation.teacher:
            return []
        self._sink(PhaseChanged(phase="evaluating"))
        scores = evaluator.score_teacher(models.teacher, self._shared_cache)
        evaluated = Evaluated(subject="teacher", **asdict(scores))
        self._sink(evaluated)
        return [evaluated]

    def _open_teacher(self, models: Models, corpus: Corpus, resume_point: ResumePoint | None) -> TeacherSignal | None:
        """The teacher's hidden states for every sample of the run, computed beforehand where there is room."""
        if models.teacher is None:
            return None
        trained_on = corpus.train.samples if self._spec.method.needs_teacher else ()
        scored_on = () if corpus.validation is None else corpus.validation.samples
        if not (samples := (*trained_on, *scored_on)):
            return None
        self._sink(PhaseChanged(phase="caching_teacher"))
        source = TeacherSource(
            models.teacher.digest,
            models.teacher.structure,
            self._precision,
            load=models.teacher.whole,
            head_only=models.teacher.head_only,
        )
        teacher = open_teacher(
            source,
            samples,
            shared_cache=self._shared_cache,
            sink=self._sink,
            should_stop=self._should_stop,
            # A run goes on with the states that it began with, where out of memory had made their batches smaller too.
            batch_tokens=None if resume_point is None else resume_point.state.teacher_batch_tokens,
        )
        return self._resources.enter_context(teacher)

    def _trainer(
        self,
        models: Models,
        samples: list[EncodedSample],
        table: tuple[StagePlan, ...],
        resume_point: ResumePoint | None,
        teacher: TeacherSignal | None,
        evaluator: Evaluator | None,
    ) -> Trainer:
        model = models.student.model
        optimizer = make_optimizer(model, self._spec.training)
        state = self._initial_state() if resume_point is None else resume_point.state
        is_cached = not isinstance(teacher, LiveTeacher)
        teacher_batch_tokens = teacher.batch_tokens if isinstance(teacher, CachedTeacher) else None
        if resume_point is not None:
            load_weights(model, resume_point.directory)
            checkpoint.restore_optimizer(resume_point.directory, model, optimizer)
            if state.cached_teacher != is_cached:
                message = f"continued with the teacher {'cached' if is_cached else 'live'}, so not to the same bits"
                self._sink(Warned(code="not_exact", message=message))
            elif state.teacher_batch_tokens not in (None, teacher_batch_tokens):
                message = "continued with a teacher that runs on smaller batches, so not to the same bits"
                self._sink(Warned(code="not_exact", message=message))
        state.cached_teacher = is_cached
        state.teacher_batch_tokens = teacher_batch_tokens
        loss = training_loss(
            model,
            teacher,
            self._spec.method,
            shared_vocabulary=models.shared_vocabulary,
            precision=self._precision,
            execution=LossExecution(
                self._sizes.loss_chunk_tokens, backend="inductor" if self._spec.resources.compile else None
            ),
            product_weights=models.product_weights,
        )

        def score(*, sampled: bool) -> Scores:
            assert evaluator is not None  # Without one the trainer is given no score.
            with models.product_weights.in_use():
                return evaluator.score(model, teacher, sampled=sampled)

        return Trainer(
            spec=self._spec,
            table=table,
            samples=samples,
            student=Student(model, models.tokenizer, optimizer),
            training_loss=loss,
            packed=loss.is_fused and can_pack(model, self._spec.data.max_length),
            micro_batch_tokens=self._sizes.micro_batch_tokens,
            workdir=self._workdir,
            sink=self._sink,
            should_stop=self._should_stop,
            should_pause=self._should_pause,
            score=None if evaluator is None else score,
            state=state,
        )

    def _initial_state(self) -> TrainState:
        # Dropout draws from here on; until then loading may have drawn any number of times.
        torch.manual_seed(self._spec.seed)
        return TrainState(
            micro_batch_size=self._spec.training.micro_batch_size or 1, machine=machine_fingerprint(self._device)
        )

    def _export(self, models: Models, state: TrainState, ranking: list[RankedSample]) -> Result:
        self._sink(PhaseChanged(phase="exporting"))
        checkpoint.link_weights(self._workdir / checkpoint_dir(state.step), self._workdir / FINAL_DIR)
        final = [each.model_copy(update={"subject": "final", "stage": None}) for each in state.evaluations[-1:]]
        for evaluated in final:
            self._sink(evaluated)
        result = build_result(
            state, [*state.evaluations, *final], models=models, spec=self._spec, precision=self._precision.name
        )
        write_result(self._workdir, self._spec, result, state.metrics, ranking)
        self._sink(ArtifactWritten(kind="result", path=RESULT_FILE))
        self._sink(ArtifactWritten(kind="report", path=REPORT_FILE))
        size = read_manifest(self._workdir / FINAL_DIR).size_bytes
        self._sink(CheckpointSaved(kind="final", path=FINAL_DIR, step=state.step, stage=None, size_bytes=size))
        self._sink(RunFinished(step=state.step))
        return result

    def _progress(self, phase: Phase, unit: Literal["samples", "rows"]) -> OnProgress:
        return lambda done, total: self._sink(Progressed(phase=phase, done=done, total=total, unit=unit))


def _choices_at_start(spec: DistillationSpec) -> dict[str, dict[str, int]]:
    """What the engine chooses before the models are loaded, by part and field."""
    return {
        "resources": {"threads": len(os.sched_getaffinity(0))},
        "training": {"micro_batch_size": spec.training.batch_size},
    }
