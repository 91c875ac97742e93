"""Queries for projects. No function commits."""

from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import KeysetPage, fetch_page
from domain.errors import Conflict, NotFound, Unauthenticated
from domain.projects.models import Project


class ProjectNotFound(NotFound):
    """There is no project of this id, or the key does not administer it."""

    code = "project_not_found"


class ProjectExists(Conflict):
    """There is a project of this id already: choose another id."""

    code = "project_exists"


def get_project(session: Session, project_id: str) -> Project:
    """A project.

    Raises:
        ProjectNotFound: there is none of this id.
    """
    project = session.get(Project, project_id)
    if project is None:
        raise ProjectNotFound
    return project


def lock_project(session: Session, project_id: str) -> Project:
    """Like :func:`get_project`, with a row lock: what counts against a quota is counted by one transaction at a time.

    Raises:
        ProjectNotFound: there is none of this id.
    """
    options = {"populate_existing": True}
    project = session.scalars(_lock_statement(), {"project": project_id}, execution_options=options).one_or_none()
    if project is None:
        raise ProjectNotFound
    return project


def lock_project_of_key(session: Session, project_id: str) -> Project:
    """Like :func:`lock_project`, for the project of the key that a request came with.

    Raises:
        Unauthenticated: the project was deleted since the sender was identified.
    """
    try:
        return lock_project(session, project_id)
    except ProjectNotFound as error:
        raise Unauthenticated("The project of the key was deleted.") from error


@cache
def _lock_statement() -> sa.Select[Project]:
    """The statement with the parameter `project`: each submission executes it."""
    return sa.select(Project).where(Project.id == sa.bindparam("project")).with_for_update()


def list_projects(
    session: Session, *, only: str | None = None, limit: int, after: str | None = None
) -> KeysetPage[Project]:
    """The projects by id, after the one with the id `after`.

    Args:
        only: the id of the one project that is listed; null: all.
    """
    statement = sa.select(Project).order_by(Project.id)
    if only is not None:
        statement = statement.where(Project.id == only)
    return fetch_page(session, statement if after is None else statement.where(Project.id > after), limit=limit)


def create_project(session: Session, project_id: str, **columns: Any) -> Project:
    """Add a project.

    Raises:
        ProjectExists: its id is taken.
    """
    if session.get(Project, project_id) is not None:
        raise ProjectExists
    project = Project(id=project_id, **columns)
    try:
        # Two requests may both have found the id free.
        with session.begin_nested():
            session.add(project)
            session.flush()
    except sa.exc.IntegrityError as error:
        raise ProjectExists from error
    session.refresh(project)
    return project
