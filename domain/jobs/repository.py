"""Queries for jobs, their history and their results. No function commits."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session, defer

from domain.checkpoints.models import Checkpoint
from domain.db import KeysetPage, fetch_page
from domain.errors import JobNotFound
from domain.jobs.models import (
    LABEL_KEY,
    METRICS,
    Job,
    JobArtifact,
    JobAttempt,
    JobEvaluation,
    JobEvent,
    JobMetric,
    JobStage,
)
from domain.jobs.states import HELD, TERMINAL, AttemptEnd, JobStatus
from pocl.events import RESUMABLE_KINDS


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


class ListedJob(NamedTuple):
    """A job in a list: which one, and in which state of its row."""

    id: str
    version: int


def list_jobs(
    session: Session,
    project: str,
    *,
    limit: int,
    after: str | None = None,
    statuses: Collection[JobStatus] = (),
    labels: Mapping[str, str] | None = None,
) -> KeysetPage[ListedJob]:
    """The project's jobs, newest first: see :func:`get_listed_jobs` for what is shown of them.

    Args:
        after: the id of the last job of the page before (keyset pagination); that job may be deleted by now.
        statuses: only jobs in one of these states; all where it is empty.
        labels: only jobs that carry all of these labels.
    """
    statement = sa.select(Job.id, Job.version).where(Job.project == project).order_by(Job.id.desc())
    if after is not None:
        statement = statement.where(Job.id < after)
    if statuses:
        statement = statement.where(Job.status.in_(statuses))
    for key, value in (labels or {}).items():
        if not re.fullmatch(LABEL_KEY, key):
            # No job carries such a label, and some characters would end the key inside SQLite's JSON path.
            return KeysetPage([], has_more=False)
        statement = statement.where(Job.labels[key].as_string() == value)
    rows = session.execute(statement.limit(limit + 1)).all()
    return KeysetPage([ListedJob(*row) for row in rows[:limit]], has_more=len(rows) > limit)


def get_listed_jobs(session: Session, job_ids: Collection[str]) -> Sequence[Job]:
    """Jobs by their ids, in no order, without what lists do not show."""
    # To read the specifications of a page costs more than all the rest of it.
    not_shown = (Job.posted_spec, Job.spec, Job.encodings, Job.warnings, Job.plan_warnings)
    statement = sa.select(Job).where(Job.id.in_(job_ids))
    return session.scalars(statement.options(*(defer(column, raiseload=True) for column in not_shown))).all()


def list_events(
    session: Session, job_id: str, *, after: int = 0, limit: int, types: Collection[str] | None = None
) -> KeysetPage[JobEvent]:
    """A job's events whose sequence number is greater than `after`, in order.

    Args:
        types: only events of these types; null for all.
    """
    statement = sa.select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > after)
    if types is not None:
        statement = statement.where(JobEvent.type.in_(types))
    return fetch_page(session, statement.order_by(JobEvent.seq), limit=limit)


def list_latest_events(session: Session, job_id: str, *, before: int | None, limit: int) -> KeysetPage[JobEvent]:
    """A job's events whose sequence number is less than `before`, the newest first; null begins with the newest."""
    statement = sa.select(JobEvent).where(JobEvent.job_id == job_id)
    if before is not None:
        statement = statement.where(JobEvent.seq < before)
    return fetch_page(session, statement.order_by(JobEvent.seq.desc()), limit=limit)


def get_jobs(session: Session, job_ids: Collection[str]) -> dict[str, Job]:
    """Jobs with all their columns, by their ids."""
    return {job.id: job for job in session.scalars(sa.select(Job).where(Job.id.in_(job_ids)))}


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


def newest_metrics(session: Session, job: Job) -> dict[str, float]:
    """The metrics of the job's newest optimiser step, by name; empty before the first."""
    if job.step == 0:
        return {}
    # By name, though all of them are wanted: an index over job, name and step finds a step of every name only so.
    statement = sa.select(JobMetric.name, JobMetric.value).where(
        JobMetric.job_id == job.id, JobMetric.name.in_(METRICS), JobMetric.step == job.step
    )
    rows = session.execute(statement.order_by(JobMetric.name)).all()
    return {row.name: row.value for row in rows}


def metric_series(
    session: Session,
    job_id: str,
    *,
    points: int,
    names: Collection[str] = (),
    from_step: int = 0,
    to_step: int | None = None,
) -> list[MetricSeries]:
    """Metrics thinned out evenly over the steps to at most `points` + 1 each: always with the first and the last step,
    and whole where there are no more. It reads as many rows as it returns, however long the job is.

    Args:
        names: only these metrics; all where it is empty.
        from_step, to_step: the range of steps, both inclusive.
    """
    in_range = [JobMetric.step >= from_step]
    if to_step is not None:
        in_range.append(JobMetric.step <= to_step)
    series = []
    for name in sorted(set(names or METRICS)):
        of_metric = (JobMetric.job_id == job_id, JobMetric.name == name)
        pairs = _thinned_series(session, of_metric, in_range, points)
        if pairs:
            steps, values = zip(*pairs, strict=True)
            series.append(MetricSeries(name, steps, values))
    return series


def _thinned_series(
    session: Session,
    of_metric: Sequence[sa.ColumnElement[bool]],
    in_range: Sequence[sa.ColumnElement[bool]],
    points: int,
) -> Sequence[sa.Row[int, float]]:
    """The steps of one metric and its values, at most `points` + 1 of them."""
    ordered = sa.select(JobMetric.step, JobMetric.value).where(*of_metric, *in_range).order_by(JobMetric.step)
    few = session.execute(ordered.limit(points + 1)).all()
    if len(few) <= points:
        return few
    first = few[0].step
    steps = sa.select(JobMetric.step).where(*of_metric)
    last = session.scalars(steps.where(*in_range).order_by(JobMetric.step.desc()).limit(1)).one()
    # Integer division rounded up.
    stride = (last - first + points) // points
    # From each step to the first one that lies a stride further: a search in the index for each.
    reached = sa.select(sa.literal(first, sa.Integer()).label("step")).cte("reached", recursive=True)
    # With one lower bound alone: of two, SQLite may search for the wrong one.
    following = steps.where(JobMetric.step >= reached.c.step + stride, JobMetric.step <= last)
    following = following.order_by(JobMetric.step).limit(1)
    reached = reached.union_all(
        sa.select(following.correlate(reached).scalar_subquery()).where(reached.c.step.is_not(None))
    )
    # Not a join, which SQLite would begin with all steps of the metric.
    value = sa.select(JobMetric.value).where(*of_metric, JobMetric.step == reached.c.step).scalar_subquery()
    thinned = session.execute(
        sa.select(reached.c.step, value.label("value")).where(reached.c.step.is_not(None)).order_by(reached.c.step)
    ).all()
    if thinned[-1].step == last:
        return thinned
    return [*thinned, *session.execute(ordered.where(JobMetric.step == last)).all()]


def metrics_after(
    session: Session, job_id: str, names: Sequence[str], *, after: int, steps: int
) -> dict[int, dict[str, float]]:
    """The metrics of the optimiser steps after `after`, by step and name, in ascending order of steps.

    Args:
        steps: how many steps at most.
    """
    # Of each name by itself, since thinning leaves other steps of each: the key finds them without a scan.
    next_steps = session.execute(
        sa.select(
            *(
                sa.select(sa.func.min(JobMetric.step))
                .where(JobMetric.job_id == job_id, JobMetric.name == name, JobMetric.step > after)
                .scalar_subquery()
                for name in names
            )
        )
    ).one()
    first = min((step for step in next_steps if step is not None), default=None)
    if first is None:
        return {}
    rows = session.execute(
        sa.select(JobMetric.step, JobMetric.name, JobMetric.value).where(
            JobMetric.job_id == job_id,
            JobMetric.name.in_(names),
            JobMetric.step.between(first, first + steps - 1),
        )
    )
    by_step: dict[int, dict[str, float]] = {}
    for step, name, value in rows:
        by_step.setdefault(step, {})[name] = value
    return {step: {name: by_step[step][name] for name in names if name in by_step[step]} for step in sorted(by_step)}


def count_queued_jobs(session: Session, *, project: str | None = None) -> int:
    """The number of queued jobs, of one project or of all."""
    statement = sa.select(sa.func.count()).where(Job.status == JobStatus.QUEUED)
    if project is not None:
        statement = statement.where(Job.project == project)
    return session.scalar(statement) or 0


def list_other_jobs_needing(session: Session, checkpoint: Checkpoint, *, live_only: bool = False) -> list[str]:
    """The ids of the jobs that need a checkpoint, but for the one that saved it, the oldest first.

    A job that has not ended needs its teacher, its student, its ranking model and the training state that it starts
    from. One that ended before it saved a state of its own still needs the last: a retry of it starts there.

    Args:
        live_only: leave out the latter.
    """
    ranking_model = Job.spec["curriculum", "ranking", "ranker", "model"]
    models = (Job.spec["teacher"], Job.spec["student"], ranking_model)
    names_it = sa.or_(*(model["checkpoint"].as_string() == checkpoint.id for model in models))
    is_live = Job.status.in_(set(JobStatus) - TERMINAL)
    own_state = sa.select(Checkpoint.id).where(Checkpoint.job_id == Job.id, Checkpoint.kind.in_(RESUMABLE_KINDS))
    # Two statements, each with an index of its own: ended jobs are many.
    is_needed = is_live if live_only else sa.or_(is_live, ~own_state.exists())
    starts_there = sa.and_(Job.starts_from == checkpoint.id, is_needed)
    needing: set[str] = set()
    for condition in (sa.and_(is_live, names_it), starts_there):
        needing.update(session.scalars(sa.select(Job.id).where(Job.project == checkpoint.project, condition)))
    return sorted(needing - {checkpoint.job_id})


def list_live_jobs_of_dataset(session: Session, project: str, dataset_id: str) -> list[str]:
    """The ids of the jobs that have not ended and whose specification names the data set anywhere, the oldest first."""
    names_it = sa.cast(Job.spec, sa.Text).contains(f'"{dataset_id}"', autoescape=True)
    statement = sa.select(Job.id).where(Job.project == project, Job.status.not_in(TERMINAL), names_it)
    return list(session.scalars(statement.order_by(Job.id)))


def filter_ended(session: Session, job_ids: Collection[str]) -> set[str]:
    """Those of these jobs that have ended or do not exist."""
    live = session.scalars(sa.select(Job.id).where(Job.id.in_(job_ids), Job.status.not_in(TERMINAL)))
    return set(job_ids) - set(live)
