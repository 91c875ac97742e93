"""Quotas of projects: what counts against them, and the refusal of what is beyond. No function commits.

What counts is counted under a lock on the row of the project, so that of two requests for the last place one gets it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.errors import QuotaExceeded
from domain.jobs.models import Job
from domain.jobs.repository import count_queued_jobs
from domain.jobs.states import HELD, JobStatus
from domain.jobs.usage import storage_bytes
from domain.projects.models import Project
from domain.projects.repository import get_project, lock_project, lock_project_of_key
from domain.settings import Settings


@dataclass(frozen=True)
class QuotaUse:
    """How much of something a project has, and how much it may."""

    used: int
    limit: int | None
    """Null: any amount."""


@dataclass(frozen=True)
class ProjectQuotas:
    """The quotas of a project, with their use."""

    jobs_running: QuotaUse
    jobs_queued: QuotaUse
    storage_bytes: QuotaUse
    max_uploads: int | None
    """How many uploads one API process takes at once; null: any number."""


@dataclass(frozen=True)
class JobAdmission:
    """Which of some jobs a project may have in the queue."""

    errors: Sequence[QuotaExceeded | None]
    """For each of the jobs, one after the other, why the project may not have it; null where it may."""
    limits_running: bool
    """Whether the project has a quota of running jobs."""


def quotas_of(session: Session, settings: Settings, project_id: str) -> ProjectQuotas:
    """What a project has and may have.

    Raises:
        ProjectNotFound: there is no such project.
    """
    project = get_project(session, project_id)
    return ProjectQuotas(
        QuotaUse(count_running_jobs(session, project_id), project.max_jobs_running),
        QuotaUse(count_queued_jobs(session, project=project_id), _max_jobs_queued(project, settings)),
        QuotaUse(storage_bytes(session, project_id)[project_id], project.max_storage_bytes),
        project.max_uploads,
    )


def admit_job(session: Session, settings: Settings, project_id: str) -> None:
    """Lock the project until the transaction ends, and see that it may have one more queued job.

    Raises:
        QuotaExceeded: it may not, or its files take as much as they may.
        Unauthenticated: the project was deleted since the sender was identified.
    """
    (error,) = admit_jobs(session, settings, project_id, 1).errors
    if error is not None:
        raise error


def admit_jobs(session: Session, settings: Settings, project_id: str, jobs: int) -> JobAdmission:
    """Lock the project until the transaction ends, and see which of so many more queued jobs it may have.

    Raises:
        Unauthenticated: the project was deleted since the sender was identified.
    """
    project = lock_project_of_key(session, project_id)
    limit = _max_jobs_queued(project, settings)
    room = limit - session.scalars(_queued_statement(), {"project": project_id}).one()
    storage_error: QuotaExceeded | None = None
    try:
        _admit_bytes(session, project, 1)
    except QuotaExceeded as error:
        storage_error = error
    full = QuotaExceeded(f"The project has {limit} queued jobs, and may have no more: wait until one has started.")
    errors = [full if number >= room else storage_error for number in range(jobs)]
    return JobAdmission(errors, project.max_jobs_running is not None)


@cache
def _queued_statement() -> sa.Select[int]:
    """The statement with the parameter `project`: to make it takes longer than to execute it."""
    queued = sa.select(sa.func.count()).where(Job.status == JobStatus.QUEUED)
    return queued.where(Job.project == sa.bindparam("project"))


def admit_upload(session: Session, project_id: str) -> int | None:
    """How many uploads of the project one API process takes at once; null: any number.

    Raises:
        QuotaExceeded: the files of the project take as much as they may already.
    """
    project = session.get(Project, project_id)
    if project is None:
        return None
    _admit_bytes(session, project, 1)
    return project.max_uploads


def admit_file(session: Session, project_id: str, size_bytes: int) -> None:
    """Lock the project until the transaction ends, and see that its files may take so many bytes more.

    Raises:
        QuotaExceeded: they may not.
        Unauthenticated: the project was deleted since the sender was identified.
    """
    _admit_bytes(session, lock_project_of_key(session, project_id), size_bytes)


def check_room(session: Session, project_id: str, size_bytes: int) -> None:
    """Like :func:`admit_file`, without a lock: for what was made before its size was known.

    Raises:
        QuotaExceeded: the files of the project may not take so many bytes more.
    """
    project = session.get(Project, project_id)
    if project is not None:
        _admit_bytes(session, project, size_bytes)


def may_run_one_more(session: Session, project_id: str) -> bool:
    """Whether workers may hold one more job of the project; where that is limited, its row is locked until the
    transaction ends.
    """
    is_limited = sa.select(Project.id).where(Project.id == project_id, Project.max_jobs_running.is_not(None))
    if session.scalars(is_limited).one_or_none() is None:
        return True
    limit = lock_project(session, project_id).max_jobs_running
    return limit is None or count_running_jobs(session, project_id) < limit


def count_running_jobs(session: Session, project_id: str) -> int:
    """The number of jobs of the project that workers hold."""
    statement = sa.select(sa.func.count()).where(Job.project == project_id, Job.status.in_(HELD))
    return session.scalar(statement) or 0


def _max_jobs_queued(project: Project, settings: Settings) -> int:
    return settings.max_jobs_queued if project.max_jobs_queued is None else project.max_jobs_queued


def _admit_bytes(session: Session, project: Project, more: int) -> None:
    limit = project.max_storage_bytes
    if limit is None:
        return
    used = storage_bytes(session, project.id)[project.id]
    if used + more > limit:
        raise QuotaExceeded(
            f"The files of the project take {used} of the {limit} bytes that they may: delete data sets or jobs."
        )
