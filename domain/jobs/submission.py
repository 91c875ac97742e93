"""Submission of jobs: check and plan a specification, then put the job into the queue."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints import repository as checkpoints
from domain.datasets import repository as datasets
from domain.db import Database, db_now
from domain.encoding_checks import EncodingChecker
from domain.errors import CheckpointNotFound, DatasetNotFound, QuotaExceeded, Unprocessable, engine_refusals
from domain.ids import new_id
from domain.jobs.budget import with_budget
from domain.jobs.data_checks import DataFigures, StoredRows, check_datasets
from domain.jobs.model_checks import InspectedModels, inspect_models
from domain.jobs.models import LABEL_KEY, Job, JobEvent, JobStage
from domain.jobs.repository import count_queued_jobs
from domain.settings import Settings
from pocl.errors import FieldError, SpecInvalid
from pocl.plan import Estimate, ModelSize, StagePlan, estimate, stage_table
from pocl.plan_warnings import PlanWarning, plan_warnings
from pocl.prompting.encoding_warnings import set_warnings
from pocl.spec import ANSWERED_DATA, DistillationSpec, resolve
from pocl.spec.hub_allowlist import REPOSITORY_NOT_ALLOWED, allows_repository, refusal

MAX_LABELS: Final = 16
MAX_TEXT_LENGTH: Final = 200
MAX_PRIORITY: Final = 100
ASSUMED_SAMPLES: Final = 10_000
"""What a plan assumes of a data set of the Hub, which is fetched by the worker; the engine's table of stages counts."""


@dataclass(frozen=True)
class JobPlan:
    """A specification that was checked, and what a job with it would do."""

    posted_spec: Mapping[str, Any]
    """The specification as the client posted it."""
    spec: DistillationSpec
    """The resolved specification: every default is named."""
    samples: int
    """The number of training samples."""
    stages: tuple[StagePlan, ...]
    estimate: Estimate | None
    """What the job costs; null where a model's files are not at hand."""
    warnings: tuple[PlanWarning, ...]
    datasets: Mapping[str, StoredRows]
    """The data sets by the pointers to the fields that name them."""
    models: InspectedModels
    data: tuple[DataFigures, ...] = ()
    """What encoding the data sets cuts and leaves out, as far as it was tried: see :func:`check_data`."""
    pointer_prefix: str = ""
    """Where the specification stands in the client's document, for the pointers of errors."""

    @property
    def total_steps(self) -> int:
        """The optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)


@dataclass(frozen=True)
class Limits:
    """Limits of a job; null for no limit of its own."""

    max_runtime_seconds: int | None = None
    """How long all attempts together may run."""
    max_wait_seconds: int | None = None
    """How long the job may wait in the queue for its first attempt."""
    max_attempts: int | None = None
    """How many attempts may be lost or crash; null for the setting of the service."""


@dataclass(frozen=True)
class JobOptions:
    """What clients choose for a job besides its specification."""

    name: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    limits: Limits = Limits()


def submit_job(
    database: Database,
    settings: Settings,
    posted_spec: Mapping[str, Any],
    *,
    project: str,
    options: JobOptions | None = None,
) -> Job:
    """Plan a job, then create it: two transactions, so that no write lock is held while models are inspected.

    Raises:
        ApiError: as :func:`plan_job` and :func:`create_job` say.
    """
    with database.transaction(write=False) as session:
        plan = plan_job(session, settings, posted_spec, project=project)
    with database.transaction(write=True) as session:
        return create_job(session, settings, plan, project=project, options=options or JobOptions())


def plan_job(
    session: Session, settings: Settings, posted_spec: Mapping[str, Any], *, project: str, pointer_prefix: str = ""
) -> JobPlan:
    """Check a specification and plan its stages. It writes nothing: the dry run of :func:`create_job`.

    Call it in a transaction that does not write, since it reads the models' files.

    Args:
        pointer_prefix: where the specification stands in the client's document, for the pointers of errors.

    Raises:
        EngineRefusal: fields are wrong, the project does not have a data set or checkpoint, a path stands where an
            uploaded data set is needed, there are more stages than samples, the budget of a control is
            not known, or the models cannot be used together.
        PathOutsideModelRoots: a model is not where the service may read it.
    """
    with engine_refusals(pointer_prefix):
        # Templates that print the date would else print another one when a job is resumed.
        spec = with_budget(session, project, resolve(posted_spec)).with_day(datetime.now(UTC).date())
        rows, store_keys = _resolve_references(session, settings, project, spec)
        samples = _planned_samples(spec, rows["/data/train"].samples)
        stages = stage_table(spec, samples)
    models = inspect_models(settings, spec, store_keys, pointer_prefix=pointer_prefix)
    return JobPlan(
        posted_spec=posted_spec,
        spec=spec,
        samples=samples,
        stages=stages,
        estimate=_estimate(spec, stages, models),
        warnings=_warnings(spec, stages, models),
        datasets=rows,
        models=models,
        pointer_prefix=pointer_prefix,
    )


def check_data(checker: EncodingChecker, plan: JobPlan) -> JobPlan:
    """The plan with what encoding its data sets cuts and leaves out, and warnings about that: the long part of the dry
    run, which needs no transaction.

    Raises:
        EngineRefusal: a run would refuse a data set, the tokenizer or the settings of the data.
    """
    spec, prefix = plan.spec, plan.pointer_prefix
    data = tuple(check_datasets(checker, spec, plan.datasets, plan.models, pointer_prefix=prefix))
    samples = next((each.training_samples for each in data if each.training_samples is not None), plan.samples)
    if samples != plan.samples:
        # A split was planned by its shares; now its parts are known.
        with engine_refusals(prefix):
            stages = stage_table(spec, samples)
        plan = replace(
            plan,
            samples=samples,
            stages=stages,
            estimate=_estimate(spec, stages, plan.models),
            warnings=_warnings(spec, stages, plan.models),
        )
    return replace(plan, data=data, warnings=(*plan.warnings, *_data_warnings(data)))


def create_job(
    session: Session,
    settings: Settings,
    plan: JobPlan,
    *,
    project: str,
    options: JobOptions,
    lineage: Mapping[str, Any] | None = None,
) -> Job:
    """Put a planned job into the queue.

    Args:
        lineage: columns that name the parent of a retry or branch, and how far it had come.

    Raises:
        Unprocessable: the name, a label, the priority or a limit is not valid.
        QuotaExceeded: the project has as many queued jobs as it may.
        EngineRefusal: a data set or checkpoint was deleted since the plan was made.
    """
    _check_options(options, settings)
    _serialize_submissions(session, project)
    if count_queued_jobs(session, project=project) >= settings.max_jobs_queued:
        raise QuotaExceeded
    with engine_refusals(plan.pointer_prefix):
        _resolve_references(session, settings, project, plan.spec, lock=True)
    limits = options.limits
    job = Job(
        id=new_id("job"),
        project=project,
        name=options.name,
        labels=dict(options.labels),
        priority=options.priority,
        posted_spec=dict(plan.posted_spec),
        spec=plan.spec.model_dump(mode="json"),
        device=plan.spec.resources.device,
        memory_bytes=None if plan.estimate is None else plan.estimate.memory_bytes,
        event_seq=1,
        max_attempts=limits.max_attempts or settings.max_attempts,
        max_runtime_seconds=limits.max_runtime_seconds,
        runtime_left_seconds=limits.max_runtime_seconds,
        max_wait_seconds=limits.max_wait_seconds,
        waits_until=None if limits.max_wait_seconds is None else db_now(limits.max_wait_seconds),
        total_steps=plan.total_steps,
        stages=len(plan.stages),
        **(lineage or {}),
    )
    session.add(job)
    session.flush()
    # The database has set the time of creation, which is part of the resource.
    session.refresh(job)
    created = {"from": None, "to": job.status, "attempt": job.token}
    session.add(JobEvent(job_id=job.id, seq=job.event_seq, type="status", data=created))
    for planned in plan.stages:
        stage = JobStage(job_id=job.id, index=planned.index, epochs=planned.epochs)
        stage.apply_plan(planned)
        session.add(stage)
    session.flush()
    return job


def _resolve_references(
    session: Session, settings: Settings, project: str, spec: DistillationSpec, *, lock: bool = False
) -> tuple[dict[str, StoredRows], dict[str, str]]:
    """The data sets by the pointers to their fields, and the store key of each checkpoint that is named.

    Args:
        lock: let nobody delete these data sets and checkpoints until the transaction ends.

    Raises:
        SpecInvalid: the project has no such data set or checkpoint, the data are not an uploaded data set, or a
            repository of the Hub is not one of those that jobs may name.
    """
    field_errors = _refuse_repositories(settings, spec)
    get_checkpoint = checkpoints.get_checkpoint_for_share if lock else checkpoints.get_checkpoint
    get_dataset = datasets.get_dataset_for_share if lock else datasets.get_dataset
    rows: dict[str, StoredRows] = {}
    for pointer, data in spec.data_refs.items():
        if data.hub is not None:
            rows[pointer] = StoredRows(None, ASSUMED_SAMPLES)
            continue
        if data.dataset is None:
            detail = "upload the rows as a data set and give its id as `dataset`; the service reads no other files"
            field_errors.append(FieldError(f"{pointer}/path", "dataset_required", detail))
            continue
        try:
            dataset = get_dataset(session, project, data.dataset)
            path = settings.artifact_root / dataset.store_key
            rows[pointer] = StoredRows(datasets.stored_reference(dataset, path), dataset.rows, dataset.sha256)
            if dataset.prompts and pointer in ANSWERED_DATA:
                detail = f"{dataset.prompts} of its samples are prompts without an answer, from which nothing is learnt"
                field_errors.append(FieldError(f"{pointer}/dataset", "answers_missing", detail))
            if pointer == "/data/train" and spec.curriculum.ranks_by_column:
                # Where skipped prompts were counted too, the engine counts again.
                without = dataset.rows - (dataset.ingestion or {}).get("with_difficulty", dataset.rows)
                if without > 0:
                    detail = f"{without} of {dataset.rows} samples have no number in the column `difficulty`"
                    field_errors.append(FieldError("/curriculum/ranking/ranker", "difficulty_missing", detail))
        except DatasetNotFound as error:
            field_errors.append(FieldError(f"{pointer}/dataset", error.code, error.detail))
    keys: dict[str, str] = {}
    for pointer, model in spec.model_refs.items():
        if model.checkpoint is None:
            continue
        try:
            keys[model.checkpoint] = get_checkpoint(session, project, model.checkpoint).store_key
        except CheckpointNotFound as error:
            field_errors.append(FieldError(f"{pointer}/checkpoint", error.code, error.detail))
    if field_errors:
        raise SpecInvalid(field_errors)
    return rows, keys


def _refuse_repositories(settings: Settings, spec: DistillationSpec) -> list[FieldError]:
    """What is wrong with the repositories of the Hub that the specification names, if anything."""
    patterns = settings.hub_repositories
    models = {pointer: ref.hub.repo for pointer, ref in spec.model_refs.items() if ref.hub is not None}
    datasets_of_hub = {pointer: ref.hub.repo for pointer, ref in spec.data_refs.items() if ref.hub is not None}
    repos = models | datasets_of_hub
    return [
        FieldError(f"{pointer}/hub/repo", REPOSITORY_NOT_ALLOWED, refusal(patterns or (), repo))
        for pointer, repo in repos.items()
        if not allows_repository(patterns, repo)
    ]


def _planned_samples(spec: DistillationSpec, rows: int) -> int:
    """The number of samples that are trained on, of so many; about, where a split takes some of them away."""
    split = spec.data.split
    return rows if split is None else max(1, round(rows * (1 - split.validation - split.test)))


def _estimate(spec: DistillationSpec, stages: tuple[StagePlan, ...], models: InspectedModels) -> Estimate | None:
    teacher, student = models.teacher, models.student
    if student is None or (teacher is None and spec.teacher is not None):
        return None
    return estimate(
        spec,
        stages,
        teacher=ModelSize(0, 0) if teacher is None else ModelSize(teacher.parameters, teacher.vocabulary_size),
        student=ModelSize(student.parameters, student.vocabulary_size),
    )


def _warnings(
    spec: DistillationSpec, stages: tuple[StagePlan, ...], models: InspectedModels
) -> tuple[PlanWarning, ...]:
    return (*_model_warnings(spec, models), *plan_warnings(spec, stages))


def _model_warnings(spec: DistillationSpec, models: InspectedModels) -> Iterator[PlanWarning]:
    facts = {"student": models.student}
    if spec.teacher is not None:
        facts["teacher"] = models.teacher
    uninspected = [role for role, model in facts.items() if model is None]
    if uninspected:
        roles = " and ".join(uninspected)
        yield PlanWarning("models_not_inspected", f"The files of the {roles} are not at hand: the worker checks them.")
    for role, model in facts.items():
        for warning in () if model is None or _is_cut_out(spec, role) else model.warnings:
            yield PlanWarning(warning.code, f"{role}: {warning.message}")
    for warning in () if models.vocabulary is None else models.vocabulary.warnings():
        yield PlanWarning(warning.code, warning.message)
    if spec.data.train.hub is not None:
        message = f"The worker counts the samples of data.train.hub: the plan assumes {ASSUMED_SAMPLES} of them."
        yield PlanWarning("samples_assumed", message)
    if not spec.data.has_validation:
        message = "Without data.validation or data.split no stage is scored, and none is the best."
        yield PlanWarning("no_validation", message)


def _is_cut_out(spec: DistillationSpec, role: str) -> bool:
    """Whether a model consists of layers of the teacher, whose warnings are given once."""
    return role == "student" and spec.student.from_teacher is not None


def _data_warnings(data: Iterable[DataFigures]) -> Iterator[PlanWarning]:
    about_template = dict.fromkeys(warning for figures in data for warning in figures.warnings)
    yield from (PlanWarning(*warning) for warning in about_template)
    for figures in data:
        if figures.tried < figures.samples:
            message = (
                f"{figures.part}: {figures.tried} of {figures.samples} samples were tried as tokens; "
                "the worker tries all of them before it trains."
            )
            yield PlanWarning("samples_not_tried", message)
        yield from (PlanWarning(*warning) for warning in set_warnings(figures.part, figures.counts))


def _check_options(options: JobOptions, settings: Settings) -> None:
    name, labels, priority = options.name, options.labels, options.priority
    field_errors = []
    if name is not None and not _is_printable(name):
        field_errors.append(FieldError("/name", "name_invalid", f"use at most {MAX_TEXT_LENGTH} printable characters"))
    if len(labels) > MAX_LABELS:
        field_errors.append(FieldError("/labels", "too_many_labels", f"use at most {MAX_LABELS} labels"))
    for key, value in labels.items():
        if not re.fullmatch(LABEL_KEY, key) or not _is_printable(value):
            detail = f"a key matches {LABEL_KEY}, a value has at most {MAX_TEXT_LENGTH} printable characters"
            field_errors.append(FieldError("/labels", "label_invalid", detail))
            break
    if not 0 <= priority <= MAX_PRIORITY:
        field_errors.append(FieldError("/priority", "priority_invalid", f"use 0 to {MAX_PRIORITY}"))
    attempts = options.limits.max_attempts
    if attempts is not None and attempts > settings.max_attempts:
        detail = f"this service allows at most {settings.max_attempts}"
        field_errors.append(FieldError("/limits/max_attempts", "too_many_attempts", detail))
    if field_errors:
        raise Unprocessable(field_errors=field_errors)


def _is_printable(text: str) -> bool:
    return len(text) <= MAX_TEXT_LENGTH and text.isprintable()


def _serialize_submissions(session: Session, project: str) -> None:
    # SQLite has one writer anyway. On PostgreSQL two requests could both see the last free place of a quota.
    if session.get_bind().dialect.name == "postgresql":
        session.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(project, 0))))
