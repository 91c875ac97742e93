"""Jobs as they are asked for: one, a list, the queue, and what a job brought about. No function commits."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session, defer

from domain.db import KeysetPage, fetch_page
from domain.errors import JobNotFound
from domain.jobs.models import LABEL_KEY, Job, JobArtifact, JobAttempt, JobEvaluation, JobEvent, JobMetric, JobStage
from domain.jobs.states import TERMINAL, JobStatus


@dataclass(frozen=True)
class MetricSeries:
    """One metric over the optimiser steps, in rising order of steps."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def get_job(session: Session, project: str, job_id: str) -> Job:
    """A job of the project.

    Raises:
        JobNotFound: the project has no such job.
    """
    job = session.scalars(sa.select(Job).where(Job.id == job_id, Job.project == project)).one_or_none()
    if job is None:
        raise JobNotFound
    return job


def list_jobs(
    session: Session,
    project: str,
    *,
    limit: int,
    after: str | None = None,
    statuses: Collection[JobStatus] = (),
    labels: Mapping[str, str] | None = None,
) -> KeysetPage[Job]:
    """The project's jobs, newest first, without their specifications.

    Args:
        after: the id of the last job of the page before; it need not exist any more.
        statuses: keep jobs in one of these; none given: all.
        labels: keep jobs that carry all of these.
    """
    # A page of specifications costs more to read than all the rest of it.
    slim = (defer(Job.posted_spec, raiseload=True), defer(Job.spec, raiseload=True))
    statement = sa.select(Job).where(Job.project == project).order_by(Job.id.desc()).options(*slim)
    if after is not None:
        statement = statement.where(Job.id < after)
    if statuses:
        statement = statement.where(Job.status.in_(statuses))
    for key, value in (labels or {}).items():
        if not re.fullmatch(LABEL_KEY, key):
            # No job carries it, and some characters would end the key inside SQLite's JSON path.
            return KeysetPage([], has_more=False)
        statement = statement.where(Job.labels[key].as_string() == value)
    return fetch_page(session, statement, limit=limit)


def list_events(session: Session, job_id: str, *, after: int = 0, limit: int) -> KeysetPage[JobEvent]:
    """A job's events with a sequence number beyond `after`, in order."""
    statement = sa.select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > after)
    return fetch_page(session, statement.order_by(JobEvent.seq), limit=limit)


def list_stages(session: Session, job_id: str) -> Sequence[JobStage]:
    return session.scalars(sa.select(JobStage).where(JobStage.job_id == job_id).order_by(JobStage.index)).all()


def list_attempts(session: Session, job_id: str, *, limit: int, after: int = 0) -> KeysetPage[JobAttempt]:
    """A job's attempts with a number beyond `after`, in order."""
    statement = sa.select(JobAttempt).where(JobAttempt.job_id == job_id, JobAttempt.number > after)
    return fetch_page(session, statement.order_by(JobAttempt.number), limit=limit)


def get_attempt(session: Session, job_id: str, number: int) -> JobAttempt | None:
    return session.get(JobAttempt, (job_id, number))


def latest_attempt(session: Session, job_id: str) -> JobAttempt | None:
    statement = sa.select(JobAttempt).where(JobAttempt.job_id == job_id)
    return session.scalars(statement.order_by(JobAttempt.number.desc()).limit(1)).one_or_none()


def list_evaluations(session: Session, job_id: str, *, limit: int = 1000) -> Sequence[JobEvaluation]:
    """A job's evaluations in the order in which they were made."""
    statement = sa.select(JobEvaluation).where(JobEvaluation.job_id == job_id)
    return session.scalars(statement.order_by(JobEvaluation.at, JobEvaluation.step).limit(limit)).all()


def list_artifacts(session: Session, job_id: str) -> Sequence[JobArtifact]:
    return session.scalars(sa.select(JobArtifact).where(JobArtifact.job_id == job_id).order_by(JobArtifact.kind)).all()


def get_artifact(session: Session, job_id: str, kind: str) -> JobArtifact | None:
    return session.get(JobArtifact, (job_id, kind))


def find_ranking(session: Session, job: Job) -> JobArtifact | None:
    """The ranking that a job trains by: its own, or the one of its nearest ancestor in the lineage of retries and
    branches; null where there is none yet.
    """
    ancestor: Job | None = job
    while ancestor is not None:
        ranking = get_artifact(session, ancestor.id, "ranking")
        if ranking is not None or ancestor.parent_job_id is None:
            return ranking
        ancestor = session.get(Job, ancestor.parent_job_id)
    return None


def metric_series(
    session: Session,
    job_id: str,
    *,
    points: int,
    names: Collection[str] = (),
    from_step: int = 0,
    to_step: int | None = None,
) -> list[MetricSeries]:
    """Metrics thinned out evenly to about `points` each: the first and the last step always, `points` + 1 at most.

    Args:
        names: keep these series; none given: all.
        from_step, to_step: both inclusive.
    """
    place = sa.func.row_number().over(partition_by=JobMetric.name, order_by=JobMetric.step)
    count = sa.func.count().over(partition_by=JobMetric.name)
    chosen = sa.select(
        JobMetric.name, JobMetric.step, JobMetric.value, place.label("place"), count.label("count")
    ).where(JobMetric.job_id == job_id, JobMetric.step >= from_step)
    if to_step is not None:
        chosen = chosen.where(JobMetric.step <= to_step)
    if names:
        chosen = chosen.where(JobMetric.name.in_(names))
    rows = chosen.subquery()
    # Integer division rounded up: every stride-th row.
    stride = (rows.c.count + points - 1) // points
    kept = sa.or_((rows.c.place - 1) % stride == 0, rows.c.place == rows.c.count)
    found: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in session.execute(
        sa.select(rows.c.name, rows.c.step, rows.c.value).where(kept).order_by(rows.c.name, rows.c.step)
    ):
        found.setdefault(name, []).append((step, value))
    return [MetricSeries(name, *map(tuple, zip(*pairs, strict=True))) for name, pairs in found.items()]


def count_queued_jobs(session: Session, *, project: str | None = None) -> int:
    """Jobs that wait, of one project or of all."""
    statement = sa.select(sa.func.count()).where(Job.status == JobStatus.QUEUED)
    if project is not None:
        statement = statement.where(Job.project == project)
    return session.scalar(statement) or 0


def count_live_jobs_using(session: Session, project: str, *, checkpoint: str) -> int:
    """Jobs that have not ended, and whose teacher, student or beginning is the checkpoint."""
    named = [Job.spec[role]["checkpoint"].as_string() == checkpoint for role in ("teacher", "student")]
    named.append(Job.starts_from == checkpoint)
    statement = sa.select(sa.func.count()).where(Job.project == project, Job.status.not_in(TERMINAL), sa.or_(*named))
    return session.scalar(statement) or 0


def filter_ended(session: Session, job_ids: Collection[str]) -> set[str]:
    """Those of these jobs that have ended or are not there."""
    live = session.scalars(sa.select(Job.id).where(Job.id.in_(job_ids), Job.status.not_in(TERMINAL)))
    return set(job_ids) - set(live)
