"""What trackers are sent about jobs, read from the rows, and what came of it.

The rows are the source: a tracker that was away goes on after the last step that it has, and nothing of it is kept in
memory. No function commits.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.db import db_now
from domain.jobs.models import METRICS, Job, JobArtifact, JobEvaluation, JobMetric, JobStage
from domain.jobs.states import HELD, TERMINAL, JobStatus
from domain.jobs.transitions import NewEvent, lock_job, record_events
from domain.jobs.usage import bytes_of_job
from domain.jobs.warning_counts import WarningCounts
from domain.trackers.models import JobTracker, TrackerChannel, TrackerKind

MAX_BATCH_STEPS: Final = 200
"""How many optimiser steps one message to a tracker has at most, of jobs whose metrics are whole."""
TRACKER_FAILED: Final = "tracker_failed"
TRACKER_GIVEN_UP: Final = "tracker_given_up"
_SCORES: Final = ("rouge_l", "exact_match", "cross_entropy", "divergence")


@dataclass(frozen=True)
class TrackedRun:
    """A job as a tracker is told of it."""

    job_id: str
    name: str
    options: Mapping[str, Any]
    """The fields of the tracker's options."""
    tags: Mapping[str, str]
    """The job, its project, its newest attempt and its lineage."""
    parameters: Mapping[str, Any]
    """The resolved specification."""
    run_id: str | None
    """The id of the run on the tracker's server; null before it is made."""
    parent_run_id: str | None
    """The run of the job that this one was retried or branched from; null where there is none."""
    parent_job_id: str | None


@dataclass(frozen=True)
class DueTracker:
    """A tracker that may have something to be sent."""

    run: TrackedRun
    kind: TrackerKind
    channel: TrackerChannel
    status: JobStatus
    """The state of the job."""
    step: int
    """The optimiser steps that the job has done."""
    event_seq: int
    """The number of the job's newest event: where it is the same, the job has not changed its state."""
    last_steps: Mapping[str, int]
    """The last optimiser step of each series that the tracker has."""
    failures: int

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL

    @property
    def held(self) -> bool:
        """Whether a worker holds the job, so that more may come."""
        return self.status in HELD


@dataclass(frozen=True)
class TrackedPoint:
    """The values of some series at one optimiser step."""

    step: int
    values: Mapping[str, float]


def due_trackers(session: Session, channel: TrackerChannel, *, limit: int) -> list[DueTracker]:
    """The trackers of a channel whose jobs are held by workers, or have changed their state since they were last looked
    at; those first that wait longest.
    """
    statement = (
        sa.select(JobTracker, Job)
        .join(Job, Job.id == JobTracker.job_id)
        .where(
            JobTracker.channel == channel,
            JobTracker.state == "open",
            JobTracker.due_at <= db_now(),
            sa.or_(Job.status.in_(HELD), JobTracker.pending),
        )
        .order_by(JobTracker.due_at)
        .limit(limit)
    )
    return [_due(session, tracker, job) for tracker, job in session.execute(statement).all()]


def read_points(session: Session, job_id: str, last_steps: Mapping[str, int]) -> tuple[list[TrackedPoint], bool]:
    """The values that a tracker does not have, oldest first, and whether more follow.

    The series are those of the job's metrics by their names, `stage`, and for each score of an evaluation
    `evaluation/<subject>/<split>/<score>`.
    """
    after = max((last_steps.get(name, 0) for name in METRICS), default=0)
    of_job = (JobMetric.job_id == job_id, JobMetric.step > after)
    steps = session.scalars(
        sa.select(JobMetric.step)
        .where(*of_job, JobMetric.name == METRICS[0])
        .order_by(JobMetric.step)
        .limit(MAX_BATCH_STEPS + 1)
    ).all()
    points: dict[int, dict[str, float]] = {}
    if steps:
        rows = session.execute(
            sa.select(JobMetric.name, JobMetric.step, JobMetric.value)
            .where(*of_job, JobMetric.name.in_(METRICS), JobMetric.step <= steps[:MAX_BATCH_STEPS][-1])
            .order_by(JobMetric.step)
        )
        for name, step, value in rows:
            points.setdefault(step, {})[name] = value
        _add_stages(session, job_id, points)
    has_more = len(steps) > MAX_BATCH_STEPS
    # Scores last: each step has its metrics before what was measured after it.
    found = [TrackedPoint(step, values) for step, values in points.items()]
    return found + ([] if has_more else _evaluations(session, job_id, last_steps)), has_more


def later_steps(last_steps: Mapping[str, int], points: Sequence[TrackedPoint]) -> dict[str, int]:
    """The last step of each series once these points are sent."""
    steps = dict(last_steps)
    for point in points:
        for name in point.values:
            steps[name] = max(point.step, steps.get(name, 0))
    return steps


def read_results(session: Session, job_id: str) -> dict[str, str]:
    """The best and the final student of a job, as tags: the id of the checkpoint and the digest of its manifest."""
    rows = session.scalars(
        sa.select(Checkpoint)
        .where(Checkpoint.job_id == job_id, Checkpoint.kind.in_(("best", "final")))
        .order_by(Checkpoint.step, Checkpoint.id)
    )
    return {f"pocl.checkpoint.{row.kind}": f"{row.id} sha256:{row.manifest_sha256}" for row in rows}


def record_sent(
    session: Session,
    due: DueTracker,
    last_steps: Mapping[str, int],
    *,
    complete: bool,
    next_seconds: float,
    run_id: str | None = None,
    run_url: str | None = None,
) -> None:
    """Record how much of a job its tracker has.

    Args:
        complete: whether it has all that there was when the job was in the state of `due`.
        next_seconds: when the next values are sent.
    """
    values: dict[str, Any] = {
        "last_steps": dict(last_steps),
        "due_at": db_now(next_seconds),
        "failures": 0,
        "failing_since": None,
        "problem": None,
    }
    if run_id is not None:
        values["run_id"] = run_id
    if run_url is not None:
        values["run_url"] = run_url[:1000]
    if complete and due.ended:
        values |= {"state": "closed", "pending": False}
    session.execute(_of(due).values(**values))
    if complete and not due.held:
        # A worker may have claimed and released the job since `due` was read.
        unchanged = sa.exists().where(Job.id == due.run.job_id, Job.event_seq == due.event_seq)
        session.execute(_of(due).where(unchanged).values(pending=False))


def record_failure(
    session: Session, due: DueTracker, code: str, message: str, *, wait_seconds: float, give_up_seconds: float
) -> None:
    """Record that a tracker could not be sent anything, and warn of it once until it is sent something again.

    A tracker of an ended job is given up once it has failed for `give_up_seconds`.
    """
    row = session.get(JobTracker, (due.run.job_id, due.kind), populate_existing=True)
    if row is None:
        return
    now, later = session.execute(sa.select(db_now(), db_now(wait_seconds))).one()
    row.failures += 1
    row.failing_since = row.failing_since or now
    row.problem = {"code": code, "message": message}
    row.due_at = later
    pointer = f"/trackers/{row.position}"
    if row.failures == 1:
        _warn(
            session,
            due.run.job_id,
            TRACKER_FAILED,
            f"{due.kind}: {message} The values stay in the metrics of the job, and are sent later.",
            pointer,
        )
    if due.ended and (now - row.failing_since).total_seconds() >= give_up_seconds:
        row.state, row.pending = "failed", False
        sent = max(row.last_steps.values(), default=0)
        _warn(
            session,
            due.run.job_id,
            TRACKER_GIVEN_UP,
            f"{due.kind} has the values up to step {sent} of {due.step} alone: it was given up. The metrics of the job"
            " have the others.",
            pointer,
        )
    session.flush()


def record_file(session: Session, due: DueTracker, *, store_key: str, size_bytes: int, sha256: str) -> str | None:
    """Record the file of a tracker in place of an earlier one.

    Returns:
        the key of the file whose place it takes, which may be removed; null where there was none.
    """
    job = lock_job(session, due.run.job_id)
    if job is None:
        return store_key
    earlier = session.get(JobArtifact, (job.id, due.kind))
    earlier_key = None if earlier is None else earlier.store_key
    session.merge(
        JobArtifact(
            job_id=job.id,
            kind=due.kind,
            attempt=job.token,
            store_key=store_key,
            size_bytes=size_bytes,
            sha256=sha256,
        )
    )
    session.flush()
    record_events(session, job, [], token=None, changes={"stored_bytes": bytes_of_job(job.id)})
    return earlier_key if earlier_key != store_key else None


def _of(due: DueTracker) -> sa.Update:
    return sa.update(JobTracker).where(JobTracker.job_id == due.run.job_id, JobTracker.kind == due.kind)


def _due(session: Session, tracker: JobTracker, job: Job) -> DueTracker:
    parent = None if job.parent_job_id is None else session.get(JobTracker, (job.parent_job_id, tracker.kind))
    tags = {
        "pocl.job": job.id,
        "pocl.project": job.project,
        "pocl.attempt": str(job.token),
        "pocl.status": str(job.status),
        "pocl.path": f"/v1/jobs/{job.id}",
        "pocl.retry_of": job.retry_of,
        "pocl.branch_of": job.branch_of,
    }
    run = TrackedRun(
        job_id=job.id,
        name=str(tracker.options.get("run_name") or job.name or job.id),
        options=tracker.options,
        tags={name: value for name, value in tags.items() if value is not None},
        parameters=job.spec,
        run_id=tracker.run_id,
        parent_run_id=None if parent is None else parent.run_id,
        parent_job_id=job.parent_job_id,
    )
    return DueTracker(
        run,
        tracker.kind,
        tracker.channel,
        status=job.status,
        step=job.step,
        event_seq=job.event_seq,
        last_steps=tracker.last_steps,
        failures=tracker.failures,
    )


def _add_stages(session: Session, job_id: str, points: dict[int, dict[str, float]]) -> None:
    """Add the stage of each step, counted from 0."""
    # Where a stage that has not begun is planned to start is a guess: the engine counts the samples that it can use.
    stages = session.execute(
        sa.select(JobStage.first_step, JobStage.index)
        .where(JobStage.job_id == job_id, JobStage.started_at.is_not(None))
        .order_by(JobStage.index)
    ).all()
    for step, values in points.items():
        begun = [index for first_step, index in stages if first_step < step]
        if begun:
            values["stage"] = float(begun[-1])


def _evaluations(session: Session, job_id: str, last_steps: Mapping[str, int]) -> list[TrackedPoint]:
    rows = session.scalars(
        sa.select(JobEvaluation).where(JobEvaluation.job_id == job_id).order_by(JobEvaluation.step, JobEvaluation.at)
    )
    points = []
    for row in rows:
        scores = {f"evaluation/{row.subject}/{row.split}/{name}": getattr(row, name) for name in _SCORES}
        new = {
            name: value for name, value in scores.items() if value is not None and row.step > last_steps.get(name, -1)
        }
        if new:
            points.append(TrackedPoint(row.step, new))
    return points


def _warn(session: Session, job_id: str, code: str, message: str, pointer: str) -> None:
    job = lock_job(session, job_id)
    if job is None:
        return
    warnings = WarningCounts(job.warnings)
    is_first = warnings.add(code, message, datetime.now(UTC))
    # The history of an ended job ends with its end.
    events = [NewEvent("warning", {"code": code, "message": message, "pointer": pointer})]
    shown = events if is_first and not job.ended else []
    record_events(session, job, shown, token=None, changes={"warnings": warnings.entries})


def flatten(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields as one level: names joined by dots, values as text, lists as JSON; null fields are left out."""
    flat: dict[str, str] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return flat
