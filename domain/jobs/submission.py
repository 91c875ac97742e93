"""Submission of jobs: put planned jobs into the queue."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import Database, db_now, kept_by_database
from domain.errors import ApiError, engine_refusals
from domain.ids import new_id
from domain.jobs.fleet import ResourceRequest
from domain.jobs.forecast import as_stored
from domain.jobs.job_options import JobOptions, check_options
from domain.jobs.models import Job, JobEvent, JobStage
from domain.jobs.planning import JobPlan, forecast_plan, plan_job
from domain.jobs.queue import QueuedJob, explain_new
from domain.jobs.queue_order import PositionCounter
from domain.jobs.quotas import admit_jobs
from domain.jobs.references import resolve_references, share_references
from domain.jobs.stored_specs import stored_spec
from domain.jobs.work_progress import WorkPlan
from domain.logs import current_request_id
from domain.settings import Settings
from domain.tracing import current_traceparent
from domain.trackers.repository import add_trackers

_INSERT_JOB: Final = sa.insert(Job).returning(Job)

# Into the tables: nothing of these rows is read again here.
_INSERT_EVENT: Final = sa.insert(JobEvent.metadata.tables[JobEvent.__tablename__])

_INSERT_STAGE: Final = sa.insert(JobStage.metadata.tables[JobStage.__tablename__])


@dataclass(frozen=True)
class Submission:
    """A planned job, and what its client chose for it."""

    plan: JobPlan
    options: JobOptions = field(default_factory=JobOptions)
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
    are_kept = share_references(session, project, [each.plan.spec for each in submissions])
    outcomes: list[dict[str, Any] | ApiError] = []
    for submission, quota_error in zip(submissions, admission.errors, strict=True):
        try:
            check_options(session, settings, submission.options)
            if quota_error is not None:
                raise quota_error
            if not are_kept:
                with engine_refusals(submission.plan.pointer_prefix):
                    resolve_references(session, settings, project, submission.plan.spec, lock=True)
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
        "forecast": as_stored(plan.forecast, plan.estimate, plan.student_parameters),
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
