"""What a retention policy deletes of ended jobs and unused data sets, found and deleted in bounded steps.

Nothing is deleted that a live job, a retry, a branch, a pin or a publication needs. Each function that deletes looks
again under the locks of the rows: what was found before may have got a retry, a pin or another policy since.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session, load_only

from domain.checkpoints.models import Checkpoint
from domain.datasets.models import Dataset
from domain.db import db_now
from domain.exports.repository import exported_bytes, exported_checkpoints
from domain.jobs.actions import remove_job
from domain.jobs.checkpoint_deletion import discard_checkpoints
from domain.jobs.models import Job, JobAttempt, JobEvent, JobLog, JobMetric
from domain.jobs.repository import list_other_jobs_needing
from domain.jobs.states import TERMINAL
from domain.jobs.transitions import lock_job, record_events
from domain.publications.repository import pushed_checkpoints
from domain.retention.models import RetentionPolicy
from domain.retention.repository import get_policy

HISTORY_CHUNK: Final = 5000
"""How many rows of a history one transaction deletes."""
_LAST_KINDS: Final = {"training": 0, "stage": 1, "final": 2}
"""The kinds of checkpoint that `keep_last` counts; of those of one step the later is the last."""


@dataclass(frozen=True)
class ExpiredJob:
    """What has expired of one ended job."""

    job_id: str
    whole: bool = False
    """The job with all that it made."""
    history: bool = False
    checkpoints: tuple[str, ...] = ()
    """The ids of checkpoints that would go."""
    size_bytes: int = 0
    """The bytes of the files that would go."""


def list_ended_jobs(
    session: Session,
    policies: Mapping[str, RetentionPolicy],
    *,
    after: str = "",
    limit: int,
    project: str | None = None,
) -> Sequence[Job]:
    """Ended jobs that a policy may say something about, oldest first, after the one with the id `after`.

    Args:
        policies: of the projects that have one; jobs of others are listed where they have one of their own.
        project: only the jobs of this project.
    """
    projects = [name for name, policy in policies.items() if policy.deletes_of_jobs]
    columns = (
        Job.id,
        Job.project,
        Job.status,
        Job.finished_at,
        Job.retention,
        Job.history_deleted_at,
        Job.stored_bytes,
    )
    statement = (
        sa.select(Job)
        .where(
            Job.id > after,
            Job.status.in_(TERMINAL),
            sa.or_(Job.project.in_(projects), Job.retention.is_not(None)),
        )
        .order_by(Job.id)
        .limit(limit)
        .options(load_only(*columns))
    )
    if project is not None:
        statement = statement.where(Job.project == project)
    return session.scalars(statement).all()


def find_expired(session: Session, job: Job, policy: RetentionPolicy, now: datetime) -> ExpiredJob | None:
    """What has expired of an ended job; null for nothing.

    Args:
        policy: of the job's project; the job's own fields take its place.
    """
    policy = policy.for_job(job.retention)
    if not job.ended or job.finished_at is None:
        return None
    if _is_over(job.finished_at, policy.job_days, now) and not _is_needed(session, job.id):
        return ExpiredJob(job.id, whole=True, size_bytes=job.stored_bytes)
    history = job.history_deleted_at is None and _is_over(job.finished_at, policy.history_days, now)
    checkpoints = _expired_checkpoints(session, job, policy, now)
    if not history and not checkpoints:
        return None
    return ExpiredJob(
        job.id,
        history=history,
        checkpoints=tuple(each.id for each in checkpoints),
        size_bytes=sum(each.size_bytes for each in checkpoints)
        + exported_bytes(session, [each.id for each in checkpoints]),
    )


def expiry_times(session: Session, project: str, checkpoints: Sequence[Checkpoint]) -> dict[str, datetime]:
    """When the retention policy deletes checkpoints of a project, as things stand, by their ids. Those that it keeps,
    and those of jobs that have not ended, are left out.
    """
    policy, times = get_policy(session, project), dict[str, datetime]()
    jobs = session.scalars(sa.select(Job).where(Job.id.in_({each.job_id for each in checkpoints})))
    for job in jobs.all():
        own = policy.for_job(job.retention)
        if not job.ended or job.finished_at is None:
            continue
        if own.checkpoint_days is not None:
            end = job.finished_at + timedelta(days=own.checkpoint_days)
            times |= {each.id: end for each in _list_not_kept(session, job, own)}
        if own.job_days is not None and not _is_needed(session, job.id):
            end = job.finished_at + timedelta(days=own.job_days)
            times |= {each.id: min(end, times.get(each.id, end)) for each in checkpoints if each.job_id == job.id}
    return times


def delete_expired_checkpoints(session: Session, job_id: str, policy: RetentionPolicy) -> int:
    """Delete the checkpoints of an ended job that have expired; their files are removed after the commit.

    Returns:
        how many were deleted.
    """
    job = lock_job(session, job_id)
    if job is None:
        return 0
    # The lock keeps new jobs from referring to one of them, and clients from pinning it, until the transaction ends.
    session.scalars(
        sa.select(Checkpoint).where(Checkpoint.job_id == job_id).with_for_update(),
        execution_options={"populate_existing": True},
    ).all()
    expired = _expired_checkpoints(
        session, job, policy.for_job(job.retention), session.scalars(sa.select(db_now())).one()
    )
    discard_checkpoints(session, job, expired, "expired")
    return len(expired)


def delete_history(session: Session, job_id: str, policy: RetentionPolicy) -> bool:
    """Delete a part of the events, metrics and logs of an ended job whose history has expired.

    Its changes of state stay, and its newest event, by which a client that follows it knows that nothing comes after.

    Returns:
        whether more of it is left.
    """
    job = lock_job(session, job_id)
    if job is None or job.finished_at is None or not job.ended:
        return False
    policy = policy.for_job(job.retention)
    if not _is_over(job.finished_at, policy.history_days, session.scalars(sa.select(db_now())).one()):
        return False
    events = sa.select(JobEvent.seq).where(
        JobEvent.job_id == job_id, JobEvent.type != "status", JobEvent.seq < job.event_seq
    )
    deleted_events = _delete_count(
        session,
        sa.delete(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq.in_(events.limit(HISTORY_CHUNK))),
    )
    metrics = sa.select(JobMetric.name, JobMetric.step).where(JobMetric.job_id == job_id)
    deleted_metrics = _delete_count(
        session,
        sa.delete(JobMetric).where(
            JobMetric.job_id == job_id,
            sa.tuple_(JobMetric.name, JobMetric.step).in_(metrics.limit(HISTORY_CHUNK)),
        ),
    )
    if max(deleted_events, deleted_metrics) >= HISTORY_CHUNK:
        return True
    session.execute(sa.delete(JobLog).where(JobLog.job_id == job_id))
    session.execute(sa.update(JobAttempt).where(JobAttempt.job_id == job_id).values(log_tail=""))
    record_events(session, job, [], token=None, changes={"history_deleted_at": db_now(), "warnings": []})
    return False


def delete_expired_job(session: Session, job_id: str, policy: RetentionPolicy) -> str | None:
    """Delete an ended job that has expired, with all that it made.

    Returns:
        the store key whose files may be removed after the commit; null where the job stays.
    """
    job = lock_job(session, job_id)
    if job is None or job.finished_at is None or not job.ended:
        return None
    own = session.scalars(sa.select(Checkpoint).where(Checkpoint.job_id == job_id).with_for_update()).all()
    now = session.scalars(sa.select(db_now())).one()
    if not _is_over(job.finished_at, policy.for_job(job.retention).job_days, now) or _is_needed(session, job_id):
        return None
    return remove_job(session, job, own)


def list_unused_datasets(
    session: Session, project: str, policy: RetentionPolicy, *, after: str = "", limit: int
) -> Sequence[Dataset]:
    """The data sets of a project that no job has named for so many days, oldest first, after the one of id `after`."""
    if policy.dataset_days is None:
        return []
    since = db_now(-86_400 * policy.dataset_days)
    quoted = sa.literal('"').concat(Dataset.id).concat('"')
    recent = sa.select(Job.id).where(
        Job.project == Dataset.project,
        sa.or_(Job.status.not_in(TERMINAL), Job.finished_at >= since),
        sa.cast(Job.spec, sa.Text).contains(quoted),
    )
    statement = sa.select(Dataset).where(
        Dataset.project == project, Dataset.id > after, Dataset.created_at < since, ~recent.exists()
    )
    return session.scalars(statement.order_by(Dataset.id).limit(limit)).all()


def _expired_checkpoints(session: Session, job: Job, policy: RetentionPolicy, now: datetime) -> list[Checkpoint]:
    if job.finished_at is None or not job.ended or not _is_over(job.finished_at, policy.checkpoint_days, now):
        return []
    return _list_not_kept(session, job, policy)


def _list_not_kept(session: Session, job: Job, policy: RetentionPolicy) -> list[Checkpoint]:
    """The checkpoints of an ended job that a policy deletes in its time."""
    own = session.scalars(sa.select(Checkpoint).where(Checkpoint.job_id == job.id)).all()
    counted = [each for each in own if each.kind in _LAST_KINDS]
    counted.sort(key=lambda each: (each.step, _LAST_KINDS[each.kind], each.id), reverse=True)
    kept = {each.id for each in counted[: policy.keep_last]}
    best = [each.id for each in own if each.kind == "best"]
    if policy.keep_best and best:
        kept.add(max(best))
    ids = [each.id for each in own]
    kept |= pushed_checkpoints(session, ids) | exported_checkpoints(session, ids)
    return [
        each for each in own if each.id not in kept and not each.pinned and not list_other_jobs_needing(session, each)
    ]


def _is_needed(session: Session, job_id: str) -> bool:
    """Whether a job stays whatever its age: it has a retry or branch, a pin, or a checkpoint that another job needs or
    that is exported or pushed to the Hub.
    """
    children = sa.select(Job.id).where(sa.or_(Job.retry_of == job_id, Job.branch_of == job_id)).limit(1)
    if session.scalars(children).one_or_none() is not None:
        return True
    own = session.scalars(sa.select(Checkpoint).where(Checkpoint.job_id == job_id)).all()
    ids = [each.id for each in own]
    if pushed_checkpoints(session, ids) or exported_checkpoints(session, ids):
        return True
    return any(each.pinned or list_other_jobs_needing(session, each) for each in own)


def _is_over(since: datetime, days: int | None, now: datetime) -> bool:
    return days is not None and now - since >= timedelta(days=days)


def _delete_count(session: Session, statement: sa.Delete) -> int:
    result = session.execute(statement, execution_options={"synchronize_session": False})
    return int(result.rowcount)  # type: ignore[attr-defined] # A DELETE has one.
