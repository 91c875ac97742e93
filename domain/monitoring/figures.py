"""The figures of the whole service that its monitoring asks for, read from the rows. Nothing here writes.

Each query reads an index alone, or as many rows as there are workers and held jobs: a million ended jobs cost nothing.
What has to read whole tables is apart, in :func:`read_table_figures`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, get_args

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import db_now
from domain.end_counts.models import EndKind
from domain.end_counts.repository import list_end_counts
from domain.exports.repository import count_open_exports
from domain.jobs.models import Job
from domain.jobs.states import HELD, TERMINAL, JobStatus
from domain.jobs.usage import storage_bytes_by_kind
from domain.publications.models import UNDER_WAY, Publication
from domain.webhooks.models import WebhookDelivery, WebhookEndpoint, WebhookStatus
from domain.workers.models import GpuFigures, SchedulerHeartbeat, Worker, WorkerState
from domain.workers.repository import get_leader, worker_state

MAX_PROJECTS: Final = 50
"""Projects that have figures of their own; those of further ones are added up under :data:`OTHER_PROJECTS`."""
OTHER_PROJECTS: Final = "(other)"
"""Stands for projects without figures of their own; no project can have this name."""
_MAX_END_COUNTS: Final = 300
_MAX_GPUS: Final = 1000
_LIVE: Final = sorted(set(JobStatus) - TERMINAL)


@dataclass(frozen=True)
class ProjectFigures:
    """The live jobs of one project."""

    jobs: Mapping[JobStatus, int]
    """How many jobs are in each state that is not terminal."""
    oldest_queued_seconds: float | None
    """How long ago the oldest queued job was submitted; null where none is queued."""
    tokens_per_second: float = 0
    """The training throughput of its running jobs together."""


@dataclass(frozen=True)
class EndFigures:
    """How many jobs or attempts have ended in one way."""

    kind: EndKind
    end: str
    fault: str
    code: str
    count: int


@dataclass(frozen=True)
class ServiceFigures:
    """The figures of the service at one moment."""

    projects: Mapping[str, ProjectFigures]
    """By the name of the project, at most :data:`MAX_PROJECTS` and one more."""
    backing_off: int
    """Queued jobs that wait after a failure."""
    expired_leases: int
    """Held jobs whose lease has expired, and which nobody has reaped yet."""
    progress_age_seconds: float | None
    """The longest silence of an engine among the running jobs; null where none runs."""
    workers: Mapping[WorkerState, int]
    gpus: Mapping[str, GpuFigures]
    """The newest figures of the GPUs of live workers, by UUID."""
    schedulers: Mapping[bool, int]
    """Live schedulers, by whether they reach the broker."""
    has_leader: bool
    """Whether one of the schedulers leads."""
    scheduler_age_seconds: float | None
    """The time since the newest heartbeat of a scheduler; null where none has had one for a day."""
    ends: Sequence[EndFigures]


@dataclass(frozen=True)
class TableFigures:
    """The figures of the service that need whole tables."""

    stored_bytes: Mapping[str, int]
    """The bytes of stored checkpoints, data sets and other files of jobs, by what they are."""
    webhook_endpoints: Mapping[str, int]
    """How many endpoints are in each state."""
    pending_deliveries: int
    """Messages of webhooks that are neither delivered nor given up."""
    oldest_delivery_seconds: float | None
    """How long ago the oldest of them was written; null where there is none."""
    publications: Mapping[str, int] = field(default_factory=dict)
    """How many publications are in each state but `published`."""
    oldest_publication_seconds: float | None = None
    """How long ago the job of the oldest one under way succeeded; null where there is none."""
    exports: Mapping[str, int] = field(default_factory=dict)
    """How many exports of checkpoints are in each state but `complete`."""


def read_figures(session: Session, *, lease_seconds: float) -> ServiceFigures:
    """Read the figures of the service.

    Args:
        lease_seconds: a worker or scheduler whose last heartbeat is older is lost.
    """
    now = session.scalars(sa.select(db_now())).one()
    tokens_per_second, progress_age = _training(session, now)
    workers = session.scalars(sa.select(Worker)).all()
    holding = set(session.scalars(sa.select(Job.lease_owner).where(Job.status.in_(HELD))))
    lost_before = session.scalars(sa.select(db_now(-lease_seconds))).one()
    states = {
        each.name: worker_state(each, holds_job=each.name in holding, lost_before=lost_before) for each in workers
    }
    schedulers = session.scalars(sa.select(SchedulerHeartbeat)).all()
    live = [each.reaches_broker for each in schedulers if each.seen_at >= lost_before]
    return ServiceFigures(
        projects=_projects(session, now, tokens_per_second),
        backing_off=_count(session, Job.status == JobStatus.QUEUED, Job.not_before > now),
        expired_leases=_count(session, Job.status.in_(HELD), Job.lease_expires_at < now),
        progress_age_seconds=progress_age,
        workers=Counter(states.values()),
        gpus=_gpus(each for each in workers if states[each.name] != "lost"),
        schedulers={reaches: live.count(reaches) for reaches in (True, False)},
        has_leader=get_leader(session) is not None,
        scheduler_age_seconds=min((_seconds(now, each.seen_at) for each in schedulers), default=None),
        ends=[
            EndFigures(row.kind, row.end, row.fault, row.code, row.count)
            for row in list_end_counts(session, limit=_MAX_END_COUNTS)
        ],
    )


def read_table_figures(session: Session) -> TableFigures:
    """Read the figures that need whole tables."""
    now = session.scalars(sa.select(db_now())).one()
    pending, oldest = session.execute(
        sa.select(sa.func.count(), sa.func.min(WebhookDelivery.created_at)).where(WebhookDelivery.status == "pending")
    ).one()
    endpoints = session.execute(sa.select(WebhookEndpoint.status, sa.func.count()).group_by(WebhookEndpoint.status))
    publications = session.execute(
        sa.select(Publication.state, sa.func.count())
        .where(Publication.state.in_((*UNDER_WAY, "failed")))
        .group_by(Publication.state)
    )
    oldest_publication = session.scalar(
        sa.select(sa.func.min(Publication.created_at)).where(Publication.state.in_(UNDER_WAY))
    )
    return TableFigures(
        stored_bytes=storage_bytes_by_kind(session),
        webhook_endpoints=dict.fromkeys(get_args(WebhookStatus), 0) | dict(endpoints.all()),
        pending_deliveries=pending,
        oldest_delivery_seconds=None if oldest is None else _seconds(now, oldest),
        publications={"pending": 0, "uploading": 0, "failed": 0, **dict(publications.all())},
        oldest_publication_seconds=None if oldest_publication is None else _seconds(now, oldest_publication),
        exports=count_open_exports(session),
    )


@dataclass
class _ProjectRows:
    """What the rows say of one project."""

    jobs: Counter[JobStatus] = field(default_factory=Counter)
    oldest: datetime | None = None
    tokens_per_second: float = 0

    def add(self, other: "_ProjectRows") -> None:
        self.jobs += other.jobs
        oldest = [each for each in (self.oldest, other.oldest) if each is not None]
        self.oldest = min(oldest, default=None)
        self.tokens_per_second += other.tokens_per_second


def _projects(session: Session, now: datetime, tokens_per_second: Mapping[str, float]) -> dict[str, ProjectFigures]:
    rows: dict[str, _ProjectRows] = {}
    counted = session.execute(
        sa.select(Job.project, Job.status, sa.func.count(), sa.func.min(Job.created_at))
        .where(Job.status.in_(_LIVE))
        .group_by(Job.project, Job.status)
    )
    for project, status, jobs, oldest in counted:
        entry = rows.setdefault(project, _ProjectRows(tokens_per_second=tokens_per_second.get(project, 0)))
        entry.jobs[status] = jobs
        if status is JobStatus.QUEUED:
            entry.oldest = oldest
    # Those with the most jobs keep their names.
    by_size = sorted(rows, key=lambda project: (-rows[project].jobs.total(), project))
    for project in by_size[MAX_PROJECTS:]:
        rows.setdefault(OTHER_PROJECTS, _ProjectRows()).add(rows.pop(project))
    return {
        project: ProjectFigures(
            {status: entry.jobs[status] for status in _LIVE},
            None if entry.oldest is None else _seconds(now, entry.oldest),
            entry.tokens_per_second,
        )
        for project, entry in rows.items()
    }


def _training(session: Session, now: datetime) -> tuple[dict[str, float], float | None]:
    """The throughput of each project's running jobs, and the longest silence of an engine."""
    running = session.execute(
        sa.select(Job.project, sa.func.sum(Job.tokens_per_second), sa.func.min(Job.progress_at))
        .where(Job.status == JobStatus.RUNNING)
        .group_by(Job.project)
    ).all()
    silences = [_seconds(now, progress_at) for _, _, progress_at in running if progress_at is not None]
    return {project: rate or 0.0 for project, rate, _ in running}, max(silences, default=None)


def _count(session: Session, *conditions: sa.ColumnElement[bool]) -> int:
    return session.scalar(sa.select(sa.func.count()).select_from(Job).where(*conditions)) or 0


def _gpus(workers: Iterable[Worker]) -> dict[str, GpuFigures]:
    gpus: dict[str, GpuFigures] = {}
    # The newest report of a GPU comes last, and counts.
    for worker in sorted(workers, key=lambda each: each.seen_at):
        for stored in worker.gpu_figures or ():
            figures = GpuFigures.from_json(stored)
            gpus[figures.uuid] = figures
    return {uuid: gpus[uuid] for uuid in sorted(gpus)[:_MAX_GPUS]}


def _seconds(now: datetime, earlier: datetime) -> float:
    # A clock that was put back makes no age negative.
    return max(0.0, (now - earlier).total_seconds())
