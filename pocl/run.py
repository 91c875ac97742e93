"""The only door to the engine: run a specification in a directory, or continue what the directory holds."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from pocl.curriculum.difficulty import RANKING_FILE, Measured, Ranked, RankingInputs, load_or_rank
from pocl.data.batches import Prompting, encode, end_of_response_id
from pocl.data.records import Sample, read_samples
from pocl.errors import DatasetInvalid, DiskFull, EngineFailure, OutOfMemory, PoclError, is_disk_full
from pocl.evaluate import Answering, Rows, Scores, answer, evaluate, last_turn_cross_entropy
from pocl.events import (
    ArtefactWritten,
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
from pocl.inspect import refuse_long_rows
from pocl.manifest import read_manifest, replace_file
from pocl.models.loading import Loaded, load_student, load_teacher, load_weights, shared_vocabulary
from pocl.models.precision import choose_device, choose_precision
from pocl.plan import StagePlan, stage_table
from pocl.report import REPORT_FILE, Curve, ReportData, StageFigures, render
from pocl.rouge import rouge_l
from pocl.spec import SFT, DataRef, DistillationSpec
from pocl.teacher.signal import LiveTeacher, RememberedTeacher, TeacherSignal
from pocl.train import checkpoint
from pocl.train.checkpoint import MetricRow, Restored, TrainState
from pocl.train.loop import Student, Trainer, make_optimizer
from pocl.workdir import EVENTS_FILE, SPEC_FILE, EventLog, locked, settle_spec

RESULT_FILE = "result.json"
FINAL = "final"
ShouldStop = Callable[[], bool]


class Result(BaseModel):
    """What a run came to; the content of `result.json`."""

    model_config = ConfigDict(frozen=True)

    steps: int
    tokens_seen: int
    """Prompt and response tokens that the student was trained on."""
    samples: int
    stages: tuple[StageFigures, ...]
    evaluations: tuple[Evaluated, ...]
    best_stage: int | None
    """The stage whose weights are in `best/`; `final/` holds the last stage's."""
    teacher: dict[str, str | None] | None
    """Where the teacher came from, and its digest."""
    student: dict[str, str | None]
    precision: str
    machine: str


def run(spec: DistillationSpec, workdir: Path, sink: Sink, should_stop: ShouldStop = lambda: False) -> Result:
    """Distil as `spec` says, in `workdir`, or continue the run that `workdir` holds.

    `sink` is given every event; `should_stop` is asked between steps and answers, and once it is true the
    training state is saved and :class:`~pocl.errors.RunStopped` is raised.

    Raises:
        PoclError: whose class says what went wrong. The last event is then a `RunEnded` with the same code.
    """
    with locked(workdir), EventLog(workdir / EVENTS_FILE, sink) as log:
        last_step = _LastStep(log)
        try:
            return _Run(spec, workdir, last_step, should_stop).distil()
        except Exception as error:
            # Every end is reported under a code before it leaves.
            typed = _typed(error)
            log(
                RunEnded(
                    code=typed.code,
                    message=typed.message,
                    fault=typed.fault,
                    retryable=typed.retryable,
                    hint=typed.hint,
                    step=last_step.step,
                )
            )
            raise typed from error


class _LastStep:
    """A sink that remembers how far training came."""

    def __init__(self, onward: Sink) -> None:
        self._onward = onward
        self.step = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepLogged):
            self.step = event.step
        self._onward(event)


@dataclass(frozen=True)
class _Models:
    student: Loaded
    teacher: Loaded | None
    shared_vocabulary: int | None
    tokenizer: PreTrainedTokenizerBase
    """What the data is read with, and what the distilled student is saved with."""


@dataclass(frozen=True)
class _Corpus:
    """The rows of the run, tokenised."""

    train: Rows
    validation: Rows | None
    template: str
    end_id: int
    """The token that ends a response."""


class _Run:
    """One run of one specification, told in the order in which it happens."""

    def __init__(self, spec: DistillationSpec, workdir: Path, sink: Sink, should_stop: ShouldStop) -> None:
        self._spec = settle_spec(workdir, spec, _with_choices(spec))
        self._workdir = workdir
        self._sink = sink
        self._should_stop = should_stop
        torch.set_num_threads(self._spec.resources.threads or 1)
        # Its bars would fill a log file; the events say how far a run is.
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # It has no annotations.
        self._device = choose_device(self._spec.resources.device)
        self._precision = choose_precision(self._spec.training.precision, self._device)
        sink(ArtefactWritten(kind="spec", path=SPEC_FILE))

    def distil(self) -> Result:
        train_samples, validation_samples = self._read()
        table = stage_table(self._spec, len(train_samples))
        restored = self._restored()
        self._sink(
            RunStarted(
                resumed_from_step=None if restored is None else restored.state.step,
                total_steps=table[-1].first_step + table[-1].steps,
                stages=len(table),
            )
        )
        models = self._load()
        corpus = self._encode(models, train_samples, validation_samples)
        ranking = self._rank(models, corpus)
        trainer = self._trainer(models, corpus, ranking, table, restored)
        if restored is None:
            self._score_teacher(models, corpus, trainer.state)
        state = trainer.run()
        return self._export(models, state, table, ranking)

    # --- Reading and loading ---------------------------------------------------------------------------

    def _read(self) -> tuple[list[Sample], list[Sample]]:
        self._sink(PhaseChanged(phase="validating"))
        data, limit = self._spec.data, self._spec.evaluation.max_rows
        train = read_samples(_path_of(data.train))
        validation = [] if data.validation is None else read_samples(_path_of(data.validation))[:limit]
        return train, validation

    def _restored(self) -> Restored | None:
        restored, passed = checkpoint.newest(self._workdir / checkpoint.CHECKPOINTS)
        for sentence in passed:
            self._sink(Warned(code="checkpoint_passed_over", message=sentence))
        if restored is not None and restored.state.machine != self._machine():
            message = f"continued on another machine, so not to the same bits: {self._machine()}"
            self._sink(Warned(code="not_exact", message=message))
        return restored

    def _load(self) -> _Models:
        self._sink(PhaseChanged(phase="loading"))
        spec = self._spec
        teacher = None
        if spec.teacher is not None:
            teacher = load_teacher(spec.teacher, device=self._device, dtype=self._precision.weights)
        student = load_student(spec.student, teacher, device=self._device, dropout=spec.training.dropout)
        for loaded in filter(None, (teacher, student)):
            refuse_long_rows(spec.data.max_length, getattr(loaded.model.config, "max_position_embeddings", None))
        shared = None if teacher is None else shared_vocabulary(teacher, student)
        return _Models(student, teacher, shared, _tokenizer(student, teacher))

    def _encode(self, models: _Models, train: list[Sample], validation: list[Sample]) -> _Corpus:
        data, tokenizer = self._spec.data, models.tokenizer
        prompting = Prompting.choose(data.template, tokenizer)
        end_id = end_of_response_id(tokenizer, prompting)

        def rows(samples: list[Sample]) -> Rows:
            encoded = tuple(
                encode(
                    sample,
                    tokenizer,
                    prompting,
                    max_length=data.max_length,
                    max_prompt_length=data.max_prompt_length,
                    eos_token_id=end_id,
                )
                for sample in samples
            )
            return Rows(encoded, tuple(sample.references for sample in samples))

        return _Corpus(rows(train), rows(validation) if validation else None, prompting.value, end_id)

    # --- Ranking, training, exporting ------------------------------------------------------------------

    def _rank(self, models: _Models, corpus: _Corpus) -> list[Ranked]:
        """The student as it starts ranks the training samples; a ranking of the same inputs is taken over."""
        self._sink(PhaseChanged(phase="ranking"))
        settings = self._spec.curriculum.ranking
        inputs = RankingInputs(
            student=models.student.digest,
            data=_digest_of(corpus.train),
            template=corpus.template,
            rrf_k=settings.rrf_k,
            max_new_tokens=settings.max_new_tokens,
            precision=self._precision.name,
        )
        ranking, found = load_or_rank(self._workdir, inputs, lambda: self._measure(models, corpus))
        if not found:
            self._sink(ArtefactWritten(kind="ranking", path=RANKING_FILE))
        return ranking

    def _measure(self, models: _Models, corpus: _Corpus) -> list[Measured]:
        spec, rows, model = self._spec, corpus.train, models.student.model
        answers = answer(
            model,
            models.tokenizer,
            rows.encoded,
            answering=Answering(
                spec.curriculum.ranking.max_new_tokens, spec.evaluation.batch_size, end_id=corpus.end_id
            ),
            precision=self._precision,
            on_progress=self._progress("ranking", "samples"),
            should_stop=self._should_stop,
        )
        entropies = last_turn_cross_entropy(
            model,
            rows.encoded,
            batch_size=spec.evaluation.batch_size,
            precision=self._precision,
            should_stop=self._should_stop,
        )
        return [
            Measured(row=i, digest=row.digest, rouge_l=rouge_l(text, references), cross_entropy=entropy, response=text)
            for i, (row, references, text, entropy) in enumerate(
                zip(rows.encoded, rows.references, answers, entropies, strict=True)
            )
        ]

    def _trainer(
        self,
        models: _Models,
        corpus: _Corpus,
        ranking: list[Ranked],
        table: tuple[StagePlan, ...],
        restored: Restored | None,
    ) -> Trainer:
        model, training = models.student.model, self._spec.training
        teacher = None if models.teacher is None else LiveTeacher(models.teacher.model, self._precision)
        optimizer = make_optimizer(model, training)
        if restored is None:
            state = TrainState(micro_batch_size=training.micro_batch_size or 1, machine=self._machine())
        else:
            state = restored.state
            load_weights(model, restored.directory)
            checkpoint.restore_optimizer(restored.directory, model, optimizer)
        return Trainer(
            spec=self._spec,
            table=table,
            rows=[corpus.train.encoded[sample.row] for sample in ranking],
            student=Student(model, models.tokenizer, optimizer),
            teacher=None if isinstance(self._spec.method, SFT) else teacher,
            shared_vocabulary=models.shared_vocabulary,
            precision=self._precision,
            workdir=self._workdir,
            sink=self._sink,
            should_stop=self._should_stop,
            score=self._scorer(models, corpus, teacher),
            state=state,
        )

    def _scorer(self, models: _Models, corpus: _Corpus, teacher: LiveTeacher | None) -> Callable[[], Scores] | None:
        if corpus.validation is None:
            return None
        # The composition of the validation batches never changes, so the teacher reads them once.
        remembered = None if teacher is None else RememberedTeacher(teacher)
        return partial(self._score, models.student, models, corpus, corpus.validation, remembered)

    def _score_teacher(self, models: _Models, corpus: _Corpus, state: TrainState) -> None:
        if corpus.validation is None or models.teacher is None or not self._spec.evaluation.teacher:
            return
        self._sink(PhaseChanged(phase="evaluating"))
        scores = self._score(models.teacher, models, corpus, corpus.validation, None)
        evaluated = Evaluated(subject="teacher", **asdict(scores))
        state.evaluations.append(evaluated)
        self._sink(evaluated)

    def _score(
        self, loaded: Loaded, models: _Models, corpus: _Corpus, rows: Rows, teacher: TeacherSignal | None
    ) -> Scores:
        evaluation = self._spec.evaluation
        return evaluate(
            loaded.model,
            models.tokenizer,
            rows,
            answering=Answering(evaluation.max_new_tokens, evaluation.batch_size, end_id=corpus.end_id),
            precision=self._precision,
            teacher=teacher,
            shared_vocabulary=models.shared_vocabulary,
            on_progress=self._progress("evaluating", "rows"),
            should_stop=self._should_stop,
        )

    def _export(
        self, models: _Models, state: TrainState, table: tuple[StagePlan, ...], ranking: list[Ranked]
    ) -> Result:
        self._sink(PhaseChanged(phase="exporting"))
        source = self._workdir / checkpoint.CHECKPOINTS / checkpoint.name_of(state.step)
        checkpoint.link_weights(source, self._workdir / FINAL)
        final = [each.model_copy(update={"subject": "final", "stage": None}) for each in state.evaluations[-1:]]
        for each in final:
            self._sink(each)
        result = self._result(models, state, table, [*state.evaluations, *final])
        replace_file(self._workdir / RESULT_FILE, result.model_dump_json(indent=1) + "\n")
        replace_file(self._workdir / REPORT_FILE, render(_report_data(self._spec, result, state.metrics, ranking)))
        self._sink(ArtefactWritten(kind="result", path=RESULT_FILE))
        self._sink(ArtefactWritten(kind="report", path=REPORT_FILE))
        size = read_manifest(self._workdir / FINAL).size_bytes
        self._sink(CheckpointSaved(kind="final", path=FINAL, step=state.step, stage=None, size_bytes=size))
        self._sink(RunFinished(step=state.step))
        return result

    def _result(
        self, models: _Models, state: TrainState, table: tuple[StagePlan, ...], evaluations: list[Evaluated]
    ) -> Result:
        of_stages = [each for each in evaluations if each.subject == "stage"]
        best = max(of_stages, key=lambda each: each.rouge_l, default=None)
        starts = [0, *state.stage_ends[:-1]]
        return Result(
            steps=state.step,
            tokens_seen=state.tokens_seen,
            samples=table[-1].samples,
            stages=tuple(
                StageFigures(
                    index=stage.index,
                    samples=stage.samples,
                    temperature=stage.temperature,
                    kd_weight=stage.kd_weight,
                    steps=end - start,
                    end_step=end,
                )
                for stage, start, end in zip(table, starts, state.stage_ends, strict=True)
            ),
            evaluations=tuple(evaluations),
            best_stage=None if best is None else best.stage,
            teacher=None if models.teacher is None else _origin(models.teacher),
            student=_origin(models.student),
            precision=self._precision.name,
            machine=state.machine,
        )

    # --- Small things ----------------------------------------------------------------------------------

    def _progress(self, phase: Phase, unit: Literal["samples", "rows"]) -> Callable[[int, int], None]:
        return lambda done, total: self._sink(Progressed(phase=phase, done=done, total=total, unit=unit))

    def _machine(self) -> str:
        """What the bits of the result depend on besides its inputs."""
        device = (
            torch.cuda.get_device_name() if self._device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        )
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        return f"{versions}, {device}, {torch.get_num_threads()} threads"


def _with_choices(spec: DistillationSpec) -> DistillationSpec:
    """Name what the client left to the engine: threads and micro-batch."""
    threads = spec.resources.threads or len(os.sched_getaffinity(0))
    rows = spec.training.micro_batch_size or min(spec.training.batch_size, 8)
    return spec.model_copy(
        update={
            "resources": spec.resources.model_copy(update={"threads": threads}),
            "training": spec.training.model_copy(update={"micro_batch_size": rows}),
        }
    )


def _path_of(ref: DataRef) -> Path:
    if ref.path is None:
        raise DatasetInvalid("the engine reads files; a data set id is resolved by the service")
    return Path(ref.path)


def _tokenizer(student: Loaded, teacher: Loaded | None) -> PreTrainedTokenizerBase:
    """The teacher's, whose template the teacher knows, unless it has ids that the student has no embedding for."""
    if (
        teacher is None
        or len(teacher.tokenizer) > student.model.get_input_embeddings().get_parameter("weight").shape[0]
    ):
        return student.tokenizer
    return teacher.tokenizer


def _digest_of(rows: Rows) -> str:
    digest = hashlib.sha256()
    for row in rows.encoded:
        digest.update(f"{row.digest} {list(row.input_ids)}\n".encode())
    return digest.hexdigest()


def _origin(loaded: Loaded) -> dict[str, str | None]:
    return {**loaded.origin, "digest": loaded.digest}


def _report_data(spec: DistillationSpec, result: Result, metrics: list[MetricRow], ranking: list[Ranked]) -> ReportData:
    return ReportData(
        method=spec.method.name.value,
        samples=result.samples,
        tokens_seen=result.tokens_seen,
        stages=result.stages,
        evaluations=result.evaluations,
        curve=Curve(
            steps=[row.step for row in metrics],
            loss=[row.loss for row in metrics],
            cross_entropy=[row.cross_entropy for row in metrics],
            divergence=[row.divergence for row in metrics],
            temperature=[row.temperature for row in metrics],
        ),
        ranking=ranking,
        record={
            "preset": spec.preset,
            "seed": str(spec.seed),
            "precision": result.precision,
            "machine": result.machine,
            "teacher": None if result.teacher is None else result.teacher["digest"],
            "student at start": result.student["digest"],
        },
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
