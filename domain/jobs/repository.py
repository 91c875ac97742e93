"""Queries for jobs, their history and their results. No function commits."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session, defer

from domain.db import KeysetPage, fetch_page
from domain.errors import JobNotFound
from domain.jobs.models import LABEL_KEY, Job, JobArtifact, JobAttempt, JobEvaluation, JobEvent, JobMetric, JobStage
from domain.jobs.states import HELD, TERMINAL, AttemptEnd, JobStatus


@dataclass(frozen=True)
class MetricSeries:
    """One metric over the optimiser steps, in ascending order of steps."""

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
        after: the id of the last job of the page before (keyset pagination); that job may be deleted by now.
        statuses: only jobs in one of these states; all where it is empty.
        labels: only jobs that carry all of these labels.
    """
    # To read the specifications of a page costs more than all the rest of it.
    without_specs = (defer(Job.posted_spec, raiseload=True), defer(Job.spec, raiseload=True))
    statement = sa.select(Job).where(Job.project == project).order_by(Job.id.desc()).options(*without_specs)
    if after is not None:
        statement = statement.where(Job.id < after)
    if statuses:
        statement = statement.where(Job.status.in_(statuses))
    for key, value in (labels or {}).items():
        if not re.fullmatch(LABEL_KEY, key):
            # No job carries such a label, and some characters would end the key inside SQLite's JSON path.
            return KeysetPage([], has_more=False)
        statement = statement.where(Job.labels[key].as_string() == value)
    return fetch_page(session, statement, limit=limit)


def list_events(session: Session, job_id: str, *, after: int = 0, limit: int) -> KeysetPage[JobEvent]:
    """A job's events whose sequence number is greater than `after`, in order."""
    statement = sa.select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > after)
    return fetch_page(session, statement.order_by(JobEvent.seq), limit=limit)


def list_stages(session: Session, job_id: str) -> Sequence[JobStage]:
    return session.scalars(sa.select(JobStage).where(JobStage.job_id == job_id).order_by(JobStage.index)).all()


def list_attempts(session: Session, job_id: str, *, limit: int, after: int = 0) -> KeysetPage[JobAttempt]:
    """A job's attempts whose number is greater than `after`, in order."""
    statement = sa.select(JobAttempt).where(JobAttempt.job_id == job_id, JobAttempt.number > after)
    return fetch_page(session, statement.order_by(JobAttempt.number), limit=limit)


def list_failed_attempts(session: Session, job: Job, *, limit: int) -> list[JobAttempt]:
    """The newest attempts of a job that failed, crashed or were lost, oldest first."""
    if (job.token <= 1 and job.status in (*HELD, JobStatus.SUCCEEDED)) or job.token == 0:
        # No query: the first attempt has not ended, or ended well.
        return []
    statement = sa.select(JobAttempt).where(
        JobAttempt.job_id == job.id, JobAttempt.end.in_((AttemptEnd.FAILED, AttemptEnd.CRASHED, AttemptEnd.LOST))
    )
    newest = session.scalars(
        statement.order_by(JobAttempt.number.desc()).limit(limit).options(defer(JobAttempt.log_tail))
    )
    return list(reversed(newest.all()))


def get_attempt(session: Session, job_id: str, number: int) -> JobAttempt | None:
    return session.get(JobAttempt, (job_id, number))


def latest_attempt(session: Session, job_id: str) -> JobAttempt | None:
    statement = sa.select(JobAttempt).where(JobAttempt.job_id == job_id)
    return session.scalars(statement.order_by(JobAttempt.number.desc()).limit(1)).one_or_none()


def list_evaluations(session: Session, job_id: str, *, limit: int = 1000) -> Sequence[JobEvaluation]:
    """A job's evaluations in the order in which they were made."""
    statement = sa.select(JobEvaluation).where(JobEvaluation.job_id == job_id)
    return session.scalars(statement.order_by(JobEvaluation.at, JobEvaluation.step).limit(limit)).all()


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
    """Metrics downsampled evenly to about `points` each: always with the first and last step, `points` + 1 at most.

    Args:
        names: only these metrics; all where it is empty.
        from_step, to_step: the range of steps, both inclusive.
    """
    number = sa.func.row_number().over(partition_by=JobMetric.name, order_by=JobMetric.step)
    count = sa.func.count().over(partition_by=JobMetric.name)
    statement = sa.select(
        JobMetric.name, JobMetric.step, JobMetric.value, number.label("number"), count.label("count")
    ).where(JobMetric.job_id == job_id, JobMetric.step >= from_step)
    if to_step is not None:
        statement = statement.where(JobMetric.step <= to_step)
    if names:
        statement = statement.where(JobMetric.name.in_(names))
    rows = statement.subquery().c
    # Integer division rounded up.
    stride = (rows.count + points - 1) // points
    is_selected = sa.or_((rows.number - 1) % stride == 0, rows.number == rows.count)
    points_by_name: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in session.execute(
        sa.select(rows.name, rows.step, rows.value).where(is_selected).order_by(rows.name, rows.step)
    ):
        points_by_name.setdefault(name, []).append((step, value))
    return [MetricSeries(name, *map(tuple, zip(*pairs, strict=True))) for name, pairs in points_by_name.items()]


def count_queued_jobs(session: Session, *, project: str | None = None) -> int:
    """The number of queued jobs, of one project or of all."""
    statement = sa.select(sa.func.count()).where(Job.status == JobStatus.QUEUED)
    if project is not None:
        statement = statement.where(Job.project == project)
    return session.scalar(statement) or 0


def count_live_jobs_using(session: Session, project: str, *, checkpoint: str) -> int:
    """The number of jobs that have not ended, and whose teacher, student, ranking model or start is the checkpoint."""
    ranking_model = Job.spec["curriculum", "ranking", "ranker", "model"]
    models = (Job.spec["teacher"], Job.spec["student"], ranking_model)
    references = [model["checkpoint"].as_string() == checkpoint for model in models]
    references.append(Job.starts_from == checkpoint)
    statement = sa.select(sa.func.count()).where(
        Job.project == project, Job.status.not_in(TERMINAL), sa.or_(*references)
    )
    return session.scalar(statement) or 0


def list_live_jobs_of_dataset(session: Session, project: str, dataset_id: str) -> list[str]:
    """The ids of the jobs that have not ended and whose specification names the data set anywhere, the oldest first."""
    names_it = sa.cast(Job.spec, sa.Text).contains(f'"{dataset_id}"', autoescape=True)
    statement = sa.select(Job.id).where(Job.project == project, Job.status.not_in(TERMINAL), names_it)
    return list(session.scalars(statement.order_by(Job.id)))


def filter_ended(session: Session, job_ids: Collection[str]) -> set[str]:
    """Those of these jobs that have ended or do not exist."""
    live = session.scalars(sa.select(Job.id).where(Job.id.in_(job_ids), Job.status.not_in(TERMINAL)))
    return set(job_ids) - set(live)
