"""Submission of jobs: check and plan a specification, then put the job into the queue."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints import repository as checkpoints
from domain.datasets import repository as datasets
from domain.db import Database, db_now, kept_by_database
from domain.encoding_checks import EncodingChecker
from domain.errors import ApiError, CheckpointNotFound, DatasetNotFound, Unprocessable, engine_refusals
from domain.ids import new_id
from domain.jobs.budget import with_budget
from domain.jobs.data_checks import DataFigures, StoredRows, check_datasets, set_sizes
from domain.jobs.fleet import Fleet, ResourceRequest, live_fleet
from domain.jobs.forecast import Forecast, as_stored, make_forecast
from domain.jobs.model_checks import InspectedModels, inspect_models
from domain.jobs.models import LABEL_KEY, Job, JobEvent, JobStage
from domain.jobs.publication_checks import check_publication
from domain.jobs.queue import QueuedJob, explain_misfit, explain_new
from domain.jobs.queue_order import PositionCounter
from domain.jobs.quotas import admit_jobs
from domain.jobs.stored_specs import stored_spec
from domain.jobs.work_progress import WorkPlan
from domain.logs import current_request_id
from domain.settings import Settings
from domain.tracing import current_traceparent
from domain.trackers.models import MAX_TRACKERS, TrackerChannel, TrackerOptions
from domain.trackers.repository import add_trackers
from domain.workers.repository import live_trackers
from pocl.errors import FieldError, SpecInvalid
from pocl.estimate import Estimate, ModelSize, ModelSizes, SetSize, estimate
from pocl.plan import StagePlan, stage_table
from pocl.plan_warnings import PlanWarning, plan_warnings
from pocl.prompting.encoding_warnings import pointer_of_part, set_warnings
from pocl.spec import ANSWERED_DATA, DistillationSpec, resolve
from pocl.spec.hub_allowlist import REPOSITORY_NOT_ALLOWED, allows_repository, refusal

MAX_LABELS: Final = 16
MAX_TEXT_LENGTH: Final = 200
MAX_PRIORITY: Final = 100
ASSUMED_SAMPLES: Final = 10_000
"""What a plan assumes of a data set of the Hub, which is fetched by the worker; the engine's table of stages counts."""


_TRACKER_NEEDS: Final[Mapping[TrackerChannel, str]] = {
    "tensorboard": "no scheduler that is alive can write TensorBoard files: one needs the extra `trackers`",
    "mlflow": "no scheduler that is alive has MLflow: one needs the extra `trackers`, and MLFLOW_TRACKING_URI",
    "wandb": "no scheduler that is alive reaches Weights & Biases: one needs the extra `trackers`, and WANDB_API_KEY",
    "wandb_offline": "no scheduler that is alive can write files of Weights & Biases: one needs the extra `trackers`",
}
_INSERT_JOB: Final = sa.insert(Job).returning(Job)
# Into the tables: nothing of these rows is read again here.
_INSERT_EVENT: Final = sa.insert(JobEvent.metadata.tables[JobEvent.__tablename__])
_INSERT_STAGE: Final = sa.insert(JobStage.metadata.tables[JobStage.__tablename__])


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
    worker_warnings: tuple[PlanWarning, ...]
    """Those of `warnings` that compare the job with the workers there are."""
    datasets: Mapping[str, StoredRows]
    """The data sets by the pointers to the fields that name them."""
    models: InspectedModels
    fleet: Fleet
    """The workers that there were when the job was planned."""
    forecast: Forecast | None = None
    """What the job will take: see :func:`forecast_plan`."""
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
    retention: Mapping[str, Any] | None = None
    """The fields of the retention policy that the job has for itself."""
    trackers: Sequence[TrackerOptions] = ()
    """Where its metrics go besides the service; of each kind one at most."""


@dataclass(frozen=True)
class Submission:
    """A planned job, and what its client chose for it."""

    plan: JobPlan
    options: JobOptions = JobOptions()
    lineage: Mapping[str, Any] | None = None
    """Columns that name the parent of a retry or branch, and how far it had come."""
    request_id: str | None = field(default_factory=current_request_id)
    """The request that submits it: another thread may write it."""
    traceparent: str | None = field(default_factory=current_traceparent)


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
    estimated = _estimate(spec, stages, models, set_sizes(spec, samples, rows, ()))
    fleet = live_fleet(session, settings.lease_seconds)
    worker_warnings = tuple(_worker_warnings(fleet, spec, estimated))
    return JobPlan(
        posted_spec=posted_spec,
        spec=spec,
        samples=samples,
        stages=stages,
        estimate=estimated,
        warnings=(*_warnings(spec, stages, models), *worker_warnings),
        worker_warnings=worker_warnings,
        datasets=rows,
        models=models,
        fleet=fleet,
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
            warnings=(*_warnings(spec, stages, plan.models), *plan.worker_warnings),
        )
    sets = set_sizes(spec, samples, plan.datasets, data)
    warnings = (
        each if each.pointer is None else replace(each, pointer=f"{prefix}{each.pointer}")
        for each in (*plan.warnings, *_data_warnings(data))
    )
    return replace(plan, data=data, estimate=_estimate(spec, plan.stages, plan.models, sets), warnings=tuple(warnings))


def forecast_plan(session: Session, settings: Settings, plan: JobPlan) -> JobPlan:
    """The plan with what the job will take, by the workers of the plan, and a warning where the disk is full."""
    forecast = make_forecast(
        session,
        settings,
        plan.fleet,
        plan.estimate,
        device=plan.spec.resources.device,
        student_parameters=_student_parameters(plan),
    )
    disk = forecast.disk
    if disk.fits is False:
        message = (
            f"The checkpoints of the job may take {disk.needed_bytes} bytes, and {disk.free_bytes} are free where the "
            "artifact store is: free some, or keep fewer checkpoints."
        )
        plan = replace(plan, warnings=(*plan.warnings, PlanWarning("disk_space_low", message)))
    return replace(plan, forecast=forecast)


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
        QuotaExceeded: the project has as many queued jobs, or as many bytes, as it may.
        EngineRefusal: a data set or checkpoint was deleted since the plan was made.
    """
    (created,) = create_jobs(session, settings, [Submission(plan, options, lineage)], project=project)
    if isinstance(created, ApiError):
        raise created
    return created.job


def create_jobs(
    session: Session, settings: Settings, submissions: Sequence[Submission], *, project: str
) -> list[QueuedJob | ApiError]:
    """Put planned jobs of one project into the queue, one after the other.

    Returns:
        for each its job, or what :func:`create_job` raises for it: the others are created all the same.
    """
    admission = admit_jobs(session, settings, project, len(submissions))
    are_kept = _share_references(session, project, [each.plan.spec for each in submissions])
    outcomes: list[dict[str, Any] | ApiError] = []
    for submission, quota_error in zip(submissions, admission.errors, strict=True):
        try:
            check_options(session, settings, submission.options)
            if quota_error is not None:
                raise quota_error
            if not are_kept:
                with engine_refusals(submission.plan.pointer_prefix):
                    _resolve_references(session, settings, project, submission.plan.spec, lock=True)
            outcomes.append(_columns(session, settings, submission, project))
        except ApiError as error:
            outcomes.append(error)
    accepted = {
        columns["id"]: (columns, submission)
        for columns, submission in zip(outcomes, submissions, strict=True)
        if not isinstance(columns, ApiError)
    }
    created = _insert_jobs(session, accepted, project, limits_running=admission.limits_running) if accepted else {}
    return [each if isinstance(each, ApiError) else created[each["id"]] for each in outcomes]


def _share_references(session: Session, project: str, specs: Iterable[DistillationSpec]) -> bool:
    """Let nobody delete what these specifications name, by one statement; whether all of it is there.

    Where it is not, and where they name checkpoints, it is to be looked at one by one.
    """
    datasets_named: set[str] = set()
    for spec in specs:
        if any(model.checkpoint is not None for model in spec.model_refs.values()):
            return False
        datasets_named |= {data.dataset for data in spec.data_refs.values() if data.dataset is not None}
    if not datasets_named:
        return True
    return datasets.share_datasets(session, project, datasets_named) == len(datasets_named)


def _columns(session: Session, settings: Settings, submission: Submission, project: str) -> dict[str, Any]:
    """The row of a new job, without what the database sets."""
    plan, options = submission.plan, submission.options
    limits = options.limits
    if plan.forecast is None:
        plan = forecast_plan(session, settings, plan)
    assert plan.forecast is not None  # Made here if not before.
    columns: dict[str, Any] = {
        "id": new_id("job"),
        "project": project,
        "request_id": submission.request_id,
        "traceparent": submission.traceparent,
        "name": options.name,
        "labels": dict(options.labels),
        "priority": options.priority,
        "retention": None if not options.retention else dict(options.retention),
        "trackers": [each.model_dump(mode="json") for each in options.trackers] or None,
        "posted_spec": dict(plan.posted_spec),
        "spec": stored_spec(plan.spec),
        "device": plan.spec.resources.device,
        "memory_bytes": None if plan.estimate is None else plan.estimate.memory_bytes,
        "event_seq": 1,
        "max_attempts": limits.max_attempts or settings.max_attempts,
        "max_runtime_seconds": limits.max_runtime_seconds,
        "runtime_left_seconds": limits.max_runtime_seconds,
        "max_wait_seconds": limits.max_wait_seconds,
        "total_steps": plan.total_steps,
        "stages": len(plan.stages),
        "plan_warnings": [asdict(warning) for warning in plan.warnings],
        "forecast": as_stored(plan.forecast, plan.estimate, _student_parameters(plan)),
        **(submission.lineage or {}),
    }
    columns["percent"] = WorkPlan.from_stored(columns["forecast"]).at_step(columns.get("step", 0), plan.total_steps)
    return columns


def _insert_jobs(
    session: Session, accepted: Mapping[str, tuple[dict[str, Any], Submission]], project: str, *, limits_running: bool
) -> dict[str, QueuedJob]:
    """Insert rows with their first events and their planned stages; the jobs and their positions, by id.

    Args:
        limits_running: whether the project has a quota of running jobs.
    """
    rows = [columns for columns, _ in accepted.values()]
    # Before they are there: they are newer than all that is.
    counter = kept_by_database(session, PositionCounter)
    ahead = counter.count_ahead_of_newest(session, project, [row["priority"] for row in rows])
    # The rows that are returned have what the database has set: the time of creation is part of the resource.
    at_once = [row for row in rows if row["max_wait_seconds"] is None]
    inserted = list(session.scalars(_INSERT_JOB, at_once)) if at_once else []
    for row in rows:
        wait = row["max_wait_seconds"]
        if wait is not None:
            inserted += session.scalars(_INSERT_JOB.values(waits_until=db_now(wait)), [row])
    by_id = {job.id: job for job in inserted}
    jobs = {row["id"]: by_id[row["id"]] for row in rows}
    created = [{"from": None, "to": job.status, "attempt": job.token} for job in jobs.values()]
    session.execute(
        _INSERT_EVENT,
        [
            {"job_id": job.id, "seq": job.event_seq, "type": "status", "data": data}
            for job, data in zip(jobs.values(), created, strict=True)
        ],
    )
    stages = [
        {"job_id": job_id, "index": planned.index, "epochs": planned.epochs, **JobStage.planned_columns(planned)}
        for job_id, (_, submission) in accepted.items()
        for planned in submission.plan.stages
    ]
    session.execute(_INSERT_STAGE, stages)
    for job_id, (_, submission) in accepted.items():
        add_trackers(session, job_id, submission.options.trackers)
    requests = {job.id: ResourceRequest(job.device, job.memory_bytes) for job in jobs.values()}
    fleets = {job_id: submission.plan.fleet for job_id, (_, submission) in accepted.items()}
    positions = explain_new(
        session, requests, dict(zip(jobs, ahead, strict=True)), fleets, limits_running=limits_running
    )
    return {job_id: QueuedJob(job, positions[job_id]) for job_id, job in jobs.items()}


def _resolve_references(
    session: Session, settings: Settings, project: str, spec: DistillationSpec, *, lock: bool = False
) -> tuple[dict[str, StoredRows], dict[str, str]]:
    """The data sets by the pointers to their fields, and the store key of each checkpoint that is named.

    Args:
        lock: let nobody delete these data sets and checkpoints until the transaction ends.

    Raises:
        SpecInvalid: the project has no such data set or checkpoint, the data are not an uploaded data set, or a
            repository of the Hub is not one of those that jobs may read, or have their student pushed to.
    """
    field_errors = [*_refuse_repositories(settings, spec), *check_publication(session, settings, spec)]
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
            dataset = datasets.require_ready(get_dataset(session, project, data.dataset))
            path = settings.artifact_root / dataset.store_key
            rows[pointer] = StoredRows(datasets.stored_reference(dataset, path), dataset.rows, dataset.sha256)
            if dataset.prompts and pointer in ANSWERED_DATA:
                detail = f"{dataset.prompts} of its samples are prompts without an answer, from which nothing is learnt"
                field_errors.append(FieldError(f"{pointer}/dataset", "answers_missing", detail))
            if pointer == "/data/train" and spec.curriculum.ranks_by_column:
                # Where skipped prompts were counted too, the engine counts again.
                without = dataset.rows - (dataset.ingestion or {}).get("with_difficulty", dataset.rows)
                if without > 0:
                    detail = (
                        f"{without} of {dataset.rows} samples have no number in the column `difficulty`: upload them "
                        "with one, or with `columns` that name the column which has it"
                    )
                    field_errors.append(FieldError("/curriculum/ranking/ranker", "difficulty_missing", detail))
        except (DatasetNotFound, datasets.DatasetNotReady) as error:
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


def _student_parameters(plan: JobPlan) -> int | None:
    return None if plan.models.student is None else plan.models.student.parameters


def _planned_samples(spec: DistillationSpec, rows: int) -> int:
    """The number of samples that are trained on, of so many; about, where a split takes some of them away."""
    split = spec.data.split
    return rows if split is None else max(1, round(rows * (1 - split.validation - split.test)))


def _estimate(
    spec: DistillationSpec, stages: tuple[StagePlan, ...], models: InspectedModels, sets: Mapping[str, SetSize]
) -> Estimate | None:
    if models.student is None or (models.teacher is None and spec.teacher is not None):
        return None
    sizes = ModelSizes(
        student=ModelSize.of(models.student),
        teacher=None if models.teacher is None else ModelSize.of(models.teacher),
        ranker=None if models.ranking_model is None else ModelSize.of(models.ranking_model),
    )
    return estimate(spec, stages, sizes, sets)


def _warnings(
    spec: DistillationSpec, stages: tuple[StagePlan, ...], models: InspectedModels
) -> tuple[PlanWarning, ...]:
    return (*_model_warnings(spec, models), *plan_warnings(spec, stages))


def _worker_warnings(fleet: Fleet, spec: DistillationSpec, estimated: Estimate | None) -> Iterator[PlanWarning]:
    request = ResourceRequest(spec.resources.device, None if estimated is None else estimated.memory_bytes)
    misfit = explain_misfit(fleet, request)
    if misfit is not None:
        yield PlanWarning("no_worker_fits", f"{misfit} It would wait in the queue until one that fits is started.")


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
            yield PlanWarning(warning.code, f"{role}: {warning.message}", f"/{role}")
    for warning in () if models.vocabulary is None else models.vocabulary.warnings():
        yield PlanWarning(warning.code, warning.message, "/student")
    if spec.data.train.hub is not None:
        message = f"The worker counts the samples of data.train.hub: the plan assumes {ASSUMED_SAMPLES} of them."
        yield PlanWarning("samples_assumed", message, "/data/train/hub")


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
            yield PlanWarning("samples_not_tried", message, pointer_of_part(figures.part))
        about_part = set_warnings(figures.part, figures.counts, pointer_of_part(figures.part))
        yield from (PlanWarning(*warning) for warning in about_part)


def check_options(session: Session, settings: Settings, options: JobOptions) -> None:
    """
    Raises:
        Unprocessable: the name, a label, the priority or a limit is not valid, or no scheduler has a tracker.
    """
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
    field_errors += _check_trackers(session, settings, options.trackers)
    if field_errors:
        raise Unprocessable(field_errors=field_errors)


def _check_trackers(session: Session, settings: Settings, trackers: Sequence[TrackerOptions]) -> list[FieldError]:
    if not trackers:
        return []
    if len(trackers) > MAX_TRACKERS:
        return [FieldError("/trackers", "too_many_trackers", f"use at most {MAX_TRACKERS} trackers")]
    field_errors = []
    available = live_trackers(session, settings.lease_seconds)
    kinds: set[str] = set()
    for index, options in enumerate(trackers):
        if options.kind in kinds:
            detail = f"the job has another tracker of the kind {options.kind}: name one of each kind"
            field_errors.append(FieldError(f"/trackers/{index}/kind", "tracker_repeated", detail))
        kinds.add(options.kind)
        # With no scheduler alive, as while it starts again, nothing is known.
        if available is not None and options.channel not in available:
            detail = f"{_TRACKER_NEEDS[options.channel]}; have the operator set it up, or leave the tracker out"
            field_errors.append(FieldError(f"/trackers/{index}/kind", "tracker_not_available", detail))
    return field_errors


def _is_printable(text: str) -> bool:
    return len(text) <= MAX_TEXT_LENGTH and text.isprintable()
