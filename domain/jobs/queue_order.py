"""The order of the queue: priority, then fair share among projects, then age. No function commits.

A claim reads one job of each project. A position in the queue depends on every job that waits, so it is counted over
all of them; where that takes long, what was counted a moment ago is used again (:mod:`domain.reused_reads`). The place
of the newest job of a project follows from how many jobs of each priority each project has.
"""

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased

from domain.db import db_now, kept_by_database
from domain.jobs.models import Job
from domain.jobs.states import HELD, JobStatus
from domain.projects.models import Project
from domain.reused_reads import TimedRead

LONG_QUEUE: Final = 5000
"""In a queue of fewer jobs they are counted anew each time."""
_LONG_SECONDS: Final = 0.05
_MAX_NEWCOMERS: Final = 1000


def _held_by_project() -> sa.Subquery:
    """How many jobs of each project workers hold: `project` and `jobs`; none for a project without any.

    Ordering by it gives projects their fair share: of two that wait, the one with fewer held jobs comes first.
    Counted once for each project: to count for each waiting job would read all jobs of its project, ended ones too.
    """
    return (
        sa.select(Job.project, sa.func.count().label("jobs"))
        .where(Job.status.in_(HELD))
        .group_by(Job.project)
        .subquery("held")
    )


def projects_at_quota(session: Session) -> list[str]:
    """The projects of which workers hold as many jobs as their quota allows, or more."""
    return list(session.scalars(_at_quota_statement()))


@cache
def _at_quota_statement() -> sa.Select[str]:
    # Jobs are counted for the projects that have a quota alone.
    held = (
        sa.select(sa.func.count())
        .where(Job.project == Project.id, Job.status.in_(HELD))
        .correlate(Project)
        .scalar_subquery()
    )
    return sa.select(Project.id).where(Project.max_jobs_running.is_not(None), held >= Project.max_jobs_running)


@dataclass(frozen=True, order=True)
class Head:
    """The job of a project that comes first of those which a worker may claim. They order as workers claim them."""

    negative_priority: int
    held: int
    """The jobs of its project that workers hold, or are about to."""
    created_at: datetime
    job_id: str
    project: str


def first_in_line(session: Session, conditions: sa.ColumnElement[bool]) -> list[Head]:
    """The first job of each project, in no order.

    What orders the jobs of different projects is equal for all jobs of one. So the rows of one job for each project are
    read, however long the queue is.

    Args:
        conditions: which queued jobs a worker may claim, over :class:`Job`.
    """
    waiting, head = _waiting_projects(), aliased(Job)
    first = _first_of_project(conditions, waiting.c.project, Job.id).correlate(waiting).scalar_subquery()
    held = _held_by_project()
    columns = (-head.priority, sa.func.coalesce(held.c.jobs, 0), head.created_at, head.id, head.project)
    statement = sa.select(*columns).join_from(waiting, head, head.id == first)
    rows = session.execute(statement.outerjoin(held, held.c.project == head.project))
    return [Head(*row) for row in rows]


def next_of_project(session: Session, conditions: sa.ColumnElement[bool], head: Head) -> Head | None:
    """The job of a project that comes first once one more is held than for `head`; null where none is left.

    Args:
        conditions: as of :func:`first_in_line`, without the jobs that others are claiming.
    """
    statement = _first_of_project(conditions, head.project, -Job.priority, Job.created_at, Job.id)
    row = session.execute(statement).one_or_none()
    return None if row is None else Head(row[0], head.held + 1, row[1], row[2], head.project)


def _first_of_project(
    conditions: sa.ColumnElement[bool], project: str | sa.ColumnElement[str], *columns: Any
) -> sa.Select[Any]:
    statement = sa.select(*columns).where(Job.status == JobStatus.QUEUED, Job.project == project, conditions)
    return statement.order_by(Job.priority.desc(), Job.created_at, Job.id).limit(1)


def _waiting_projects() -> sa.CTE:
    """The projects that have queued jobs: `project`; one step through the index for each, and a last one for null."""
    first = sa.select(sa.func.min(Job.project).label("project")).where(Job.status == JobStatus.QUEUED)
    projects = first.cte("waiting_projects", recursive=True)
    greater = sa.and_(Job.status == JobStatus.QUEUED, Job.project > projects.c.project)
    following = sa.select(sa.func.min(Job.project)).where(greater).correlate(projects).scalar_subquery()
    return projects.union_all(sa.select(following).where(projects.c.project.is_not(None)))


def queue_order() -> sa.Subquery:
    """The queued jobs of all projects: `id`, `project`, `priority`, `backs_off` (0 or 1), and `ahead`, how many of them
    will be claimed before it.
    """
    backs_off = sa.case((Job.not_before > db_now(), 1), else_=0)
    order = (backs_off, Job.priority.desc(), Job.created_at, Job.id)
    number_in_project = sa.func.row_number().over(partition_by=Job.project, order_by=order)
    held = _held_by_project()
    share = number_in_project + sa.func.coalesce(held.c.jobs, 0)
    columns = (Job.id, Job.project, Job.priority, Job.created_at)
    statement = sa.select(*columns, share.label("share"), backs_off.label("backs_off"))
    statement = statement.outerjoin(held, held.c.project == Job.project).where(Job.status == JobStatus.QUEUED)
    queued = statement.subquery().c
    position = sa.func.row_number().over(
        order_by=(queued.backs_off, queued.priority.desc(), queued.share, queued.created_at, queued.id)
    )
    shown = (queued.id, queued.project, queued.priority, queued.backs_off)
    return sa.select(*shown, (position - 1).label("ahead")).subquery("positions")


@dataclass
class ProjectQueue:
    """What the place of a project's newest job depends on."""

    held: int = 0
    """The jobs that workers hold."""
    waiting: Counter[int] = field(default_factory=Counter)
    """How many queued jobs have each priority, without those that back off."""

    def above(self, priority: int) -> int:
        """How many wait with a higher priority."""
        return sum(jobs for each, jobs in self.waiting.items() if each > priority)


def count_ahead_of_newest(projects: Mapping[str, ProjectQueue], project: str, priority: int) -> int:
    """How many jobs will be claimed before one that is newer than all others, and not counted in `projects` yet.

    In its project it comes after all jobs of its priority. The n-th waiting job of a project has as its share n and the
    jobs that are held. Of another project those of the same priority come first whose share is not greater: of equal
    shares the older job goes first.
    """
    own = projects.get(project, ProjectQueue())
    share = own.held + own.above(priority) + own.waiting[priority] + 1
    ahead = 0
    for each in projects.values():
        above = each.above(priority)
        ahead += above + max(0, min(each.waiting[priority], share - each.held - above))
    return ahead


def count_by_project(session: Session) -> dict[str, ProjectQueue]:
    """How many jobs of each project wait and are held; projects without any are left out."""
    projects: dict[str, ProjectQueue] = {}
    for project, priority, jobs in session.execute(_waiting_by_project_statement()):
        projects.setdefault(project, ProjectQueue()).waiting[priority] = jobs
    for project, jobs in session.execute(_held_by_project_statement()):
        projects.setdefault(project, ProjectQueue()).held = jobs
    return projects


@cache
def _waiting_by_project_statement() -> sa.Select[str, int, int]:
    is_due = sa.or_(Job.not_before.is_(None), Job.not_before <= db_now())
    statement = sa.select(Job.project, Job.priority, sa.func.count())
    return statement.where(Job.status == JobStatus.QUEUED, is_due).group_by(Job.project, Job.priority)


@cache
def _held_by_project_statement() -> sa.Select[str, int]:
    held = _held_by_project().c
    return sa.select(held.project, held.jobs)


@dataclass(frozen=True)
class _Place:
    """A job's place in a queue that was counted."""

    ahead: int
    job_id: str


@dataclass(frozen=True)
class _CountedQueue:
    """The whole of a queue at one moment."""

    ahead: Mapping[str, int]
    """The jobs ahead of each, by the job's id."""
    places: Mapping[str, Sequence[_Place]]
    """The jobs of each project, the next one first."""
    newest: Mapping[str, str]
    """The greatest id of each project's jobs: ids rise with time."""
    projects: Mapping[str, ProjectQueue]

    def count_ahead_of(self, rows: Iterable["_NewcomerRow"]) -> dict[str, int]:
        """The same for jobs that came since: each as if it were the only one."""
        return {
            row.id: len(self.ahead)
            if row.backs_off
            else count_ahead_of_newest(self.projects, row.project, row.priority)
            for row in rows
        }


_NewcomerRow = sa.Row[str, str, int, int]


class PositionCounter:
    """Counts how many queued jobs come before others, and keeps what it counted where the queue is long."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, long_queue: int = LONG_QUEUE) -> None:
        self._clock = clock
        self._long_queue = long_queue
        self._lock = threading.Lock()
        self._known: TimedRead[_CountedQueue] | None = None

    def count_ahead(self, session: Session, job_ids: Collection[str]) -> dict[str, int]:
        """How many jobs will be claimed before each of these, by the job's id; jobs that are not queued are left out.

        In a long queue the numbers may be some seconds old, and that of a job which came meanwhile is an estimate.
        """
        if self._known is None:
            begun = self._clock()
            ahead = _count_some(session, job_ids)
            if self._clock() - begun < _LONG_SECONDS:
                return ahead
        queue = self._count(session)
        known = {job_id: queue.ahead[job_id] for job_id in job_ids if job_id in queue.ahead}
        newcomers = [job_id for job_id in job_ids if job_id not in known]
        if newcomers:
            known |= queue.count_ahead_of(session.execute(_newcomers(Job.id.in_(newcomers))))
        return known

    def count_ahead_of_newest(self, session: Session, project: str, priorities: Sequence[int]) -> list[int]:
        """How many jobs will be claimed before each of some that come to the queue one after the other: newer than all
        others, of one project, and not in the queue yet.
        """
        projects = dict(count_by_project(session) if self._known is None else self._count(session).projects)
        own = projects.get(project, ProjectQueue())
        projects[project] = own = ProjectQueue(own.held, own.waiting.copy())
        ahead = []
        for priority in priorities:
            ahead.append(count_ahead_of_newest(projects, project, priority))
            own.waiting[priority] += 1
        return ahead

    def list_places(self, session: Session, project: str, *, after: int, limit: int) -> dict[str, int]:
        """The jobs of a project with at least `after` jobs ahead, at most `limit`: how many are ahead of each, by the
        job's id, the next one first.
        """
        if self._known is None:
            begun = self._clock()
            rows = session.execute(_places_statement(), {"project": project, "after": after, "places": limit})
            places = {row.id: row.ahead for row in rows}
            if self._clock() - begun < _LONG_SECONDS:
                return places
        queue = self._count(session)
        counted = queue.places.get(project, ())
        newcomers = self._newcomers(session, queue, project)
        listed: list[_Place] = []
        begin = bisect_left(counted, after, key=lambda place: place.ahead)
        while len(listed) < limit and begin < len(counted):
            part = counted[begin : begin + limit]
            waiting = set(session.scalars(_still_queued([place.job_id for place in part])))
            listed += [place for place in part if place.job_id in waiting]
            begin += len(part)
        listed += [place for place in newcomers if place.ahead >= after]
        listed.sort(key=lambda place: place.ahead)
        return {place.job_id: place.ahead for place in listed[:limit]}

    def _newcomers(self, session: Session, queue: _CountedQueue, project: str) -> list[_Place]:
        """The jobs of a project that came to the queue since it was counted."""
        waits = sa.and_(Job.status == JobStatus.QUEUED, Job.project == project)
        rows = session.execute(_newcomers(sa.and_(waits, Job.id > queue.newest.get(project, ""))).limit(_MAX_NEWCOMERS))
        return [_Place(ahead, job_id) for job_id, ahead in queue.count_ahead_of(rows).items()]

    def _count(self, session: Session) -> _CountedQueue:
        """The whole queue as it was counted a moment ago, or is counted now."""
        known = self._known
        if known is not None and known.is_fresh(self._clock()):
            return known.value
        # Single flight: who asks while another counts takes what is known.
        if not self._lock.acquire(blocking=known is None):
            assert known is not None
            return known.value
        try:
            if self._known is not known and self._known is not None:
                # Counted while this thread waited for its turn.
                return self._known.value
            begun = self._clock()
            queue = _count_queue(session)
            ended = self._clock()
            is_long = len(queue.ahead) >= self._long_queue
            self._known = TimedRead(queue, ended, ended - begun) if is_long else None
            return queue
        finally:
            self._lock.release()


def count_ahead(session: Session, job_ids: Collection[str]) -> dict[str, int]:
    """See :meth:`PositionCounter.count_ahead`."""
    return kept_by_database(session, PositionCounter).count_ahead(session, job_ids)


def _count_queue(session: Session) -> _CountedQueue:
    order = queue_order().c
    ahead: dict[str, int] = {}
    places: dict[str, list[_Place]] = {}
    newest: dict[str, str] = {}
    projects: dict[str, ProjectQueue] = {}
    statement = sa.select(order.id, order.project, order.priority, order.backs_off, order.ahead)
    for job_id, project, priority, backs_off, count in session.execute(statement.order_by(order.ahead)):
        ahead[job_id] = count
        places.setdefault(project, []).append(_Place(count, job_id))
        newest[project] = max(job_id, newest.get(project, ""))
        if not backs_off:
            projects.setdefault(project, ProjectQueue()).waiting[priority] += 1
    for project, jobs in session.execute(_held_by_project_statement()):
        projects.setdefault(project, ProjectQueue()).held = jobs
    return _CountedQueue(ahead, places, newest, projects)


def _count_some(session: Session, job_ids: Collection[str]) -> dict[str, int]:
    rows = session.execute(_count_statement(), {"job_ids": list(job_ids)})
    return {row.id: row.ahead for row in rows}


def _newcomers(condition: sa.ColumnElement[bool]) -> sa.Select[str, str, int, int]:
    backs_off = sa.case((Job.not_before > db_now(), 1), else_=0).label("backs_off")
    statement = sa.select(Job.id, Job.project, Job.priority, backs_off)
    return statement.where(Job.status == JobStatus.QUEUED, condition).order_by(Job.id)


def _still_queued(job_ids: Sequence[str]) -> sa.Select[str]:
    return sa.select(Job.id).where(Job.id.in_(job_ids), Job.status == JobStatus.QUEUED)


# To make these statements takes longer than to execute them on a short queue.
@cache
def _count_statement() -> sa.Select[str, int]:
    """The statement with the parameter `job_ids`."""
    order = queue_order().c
    return sa.select(order.id, order.ahead).where(order.id.in_(sa.bindparam("job_ids", expanding=True)))


@cache
def _places_statement() -> sa.Select[str, int]:
    """The statement with the parameters `project`, `after` and `places`."""
    order = queue_order().c
    statement = sa.select(order.id, order.ahead)
    statement = statement.where(order.project == sa.bindparam("project"), order.ahead >= sa.bindparam("after"))
    return statement.order_by(order.ahead).limit(sa.bindparam("places", type_=sa.Integer()))
