"""Deletion of projects that have nothing."""

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.datasets.models import Dataset
from domain.errors import Conflict
from domain.jobs.models import Job
from domain.keys.repository import count_active_keys, delete_keys
from domain.projects.models import DEFAULT_PROJECT
from domain.projects.repository import lock_project


class ProjectIsNeeded(Conflict):
    """The project has jobs, data sets, checkpoints or keys: delete them first. `default` stays in any case."""

    code = "project_is_needed"


def delete_project(session: Session, project_id: str) -> None:
    """Delete a project that has nothing but keys that are accepted no more.

    Raises:
        ProjectNotFound: there is no such project.
        ProjectIsNeeded: it has something, or is the one that is there from the beginning.
    """
    # The lock keeps new rows from being added until the transaction ends.
    project = lock_project(session, project_id)
    if project_id == DEFAULT_PROJECT:
        raise ProjectIsNeeded("The project `default` administers the service: it stays.")
    counts = {
        name: session.scalar(sa.select(sa.func.count()).where(record.project == project_id)) or 0
        for name, record in (("jobs", Job), ("data sets", Dataset), ("checkpoints", Checkpoint))
    }
    counts["keys"] = count_active_keys(session, project_id)
    if present := [f"{count} {name}" for name, count in counts.items() if count]:
        raise ProjectIsNeeded(f"The project has {', '.join(present)}: delete them first.")
    delete_keys(session, project_id)
    session.delete(project)
    session.flush()
