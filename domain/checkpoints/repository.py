"""Queries for checkpoints. No function commits."""

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.db import KeysetPage, fetch_page
from domain.errors import CheckpointNotFound
from pocl.events import CheckpointKind


def get_checkpoint(session: Session, project: str, checkpoint_id: str) -> Checkpoint:
    """A checkpoint of the project.

    Raises:
        CheckpointNotFound: the project has no such checkpoint.
    """
    return _one(session, _by_id(project, checkpoint_id))


def get_checkpoint_for_share(session: Session, project: str, checkpoint_id: str) -> Checkpoint:
    """Like :func:`get_checkpoint`, with a shared row lock: nobody can delete it until the transaction ends.

    Raises:
        CheckpointNotFound: the project has no such checkpoint.
    """
    return _one(session, _by_id(project, checkpoint_id).with_for_update(read=True))


def list_checkpoints(
    session: Session,
    project: str,
    *,
    limit: int,
    after: str | None = None,
    job_id: str | None = None,
    kind: CheckpointKind | None = None,
) -> KeysetPage[Checkpoint]:
    """The project's checkpoints, or one job's, newest first, after the one with the id `after`."""
    statement = sa.select(Checkpoint).where(Checkpoint.project == project).order_by(Checkpoint.id.desc())
    if after is not None:
        statement = statement.where(Checkpoint.id < after)
    if job_id is not None:
        statement = statement.where(Checkpoint.job_id == job_id)
    if kind is not None:
        statement = statement.where(Checkpoint.kind == kind)
    return fetch_page(session, statement, limit=limit)


def surplus_training_states(session: Session, job_id: str, *, keep: int) -> list[Checkpoint]:
    """All but the newest `keep` of a job's checkpoints of kind `training`.

    Their rows are locked: no new job can refer to one until the transaction ends, so that the caller may check whether
    a job does.
    """
    statement = sa.select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.kind == "training")
    surplus = statement.order_by(Checkpoint.step.desc(), Checkpoint.id.desc()).offset(keep).with_for_update()
    return list(session.scalars(surplus))


def delete_checkpoint(session: Session, checkpoint: Checkpoint) -> None:
    """Delete the row; the caller removes the directory after the commit."""
    session.delete(checkpoint)
    session.flush()


def _by_id(project: str, checkpoint_id: str) -> sa.Select[Checkpoint]:
    return sa.select(Checkpoint).where(Checkpoint.id == checkpoint_id, Checkpoint.project == project)


def _one(session: Session, statement: sa.Select[Checkpoint]) -> Checkpoint:
    checkpoint = session.scalars(statement).one_or_none()
    if checkpoint is None:
        raise CheckpointNotFound
    return checkpoint
