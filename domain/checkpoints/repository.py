"""Queries for checkpoints and their tombstones. No function commits."""

from collections.abc import Collection
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint, CheckpointTombstone, DeletionReason
from domain.db import KeysetPage, db_now, fetch_page
from domain.errors import CheckpointExpired, CheckpointNotFound
from pocl.events import CheckpointKind

TOMBSTONE_SECONDS: Final = 90 * 24 * 3600
"""How long a tombstone is kept: afterwards the id is one that never was."""
_SENTENCES: Final[dict[DeletionReason, str]] = {
    "requested": "A client deleted the checkpoint",
    "surplus": "A newer training state or a better student took the place of the checkpoint",
    "expired": "The retention policy deleted the checkpoint",
    "job_deleted": "The checkpoint was deleted with its job",
}


def get_checkpoint(session: Session, project: str, checkpoint_id: str) -> Checkpoint:
    """A checkpoint of the project.

    Raises:
        CheckpointNotFound: the project has no such checkpoint.
        CheckpointExpired: the project had it, and it was deleted.
    """
    return _one(session, project, checkpoint_id, _by_id(project, checkpoint_id))


def get_checkpoint_for_share(session: Session, project: str, checkpoint_id: str) -> Checkpoint:
    """Like :func:`get_checkpoint`, with a shared row lock: nobody can delete it until the transaction ends.

    Raises:
        CheckpointNotFound: the project has no such checkpoint.
        CheckpointExpired: the project had it, and it was deleted.
    """
    return _one(session, project, checkpoint_id, _by_id(project, checkpoint_id).with_for_update(read=True))


def lock_checkpoint(session: Session, project: str, checkpoint_id: str) -> Checkpoint:
    """Like :func:`get_checkpoint`, with a row lock: no new job can refer to it until the transaction ends.

    Raises:
        CheckpointNotFound: the project has no such checkpoint.
        CheckpointExpired: the project had it, and it was deleted.
    """
    return _one(session, project, checkpoint_id, _by_id(project, checkpoint_id).with_for_update())


def list_checkpoints(
    session: Session,
    project: str,
    *,
    limit: int,
    after: str | None = None,
    job_id: str | None = None,
    stage: int | None = None,
    kinds: Collection[CheckpointKind] = (),
    pinned: bool | None = None,
) -> KeysetPage[Checkpoint]:
    """The project's checkpoints, newest first, after the one with the id `after`.

    Args:
        job_id, stage, kinds, pinned: only the checkpoints that a job saved, in this stage, of one of these kinds, that
            are pinned or are not; all where a filter is null or empty.
    """
    statement = sa.select(Checkpoint).where(Checkpoint.project == project).order_by(Checkpoint.id.desc())
    if after is not None:
        statement = statement.where(Checkpoint.id < after)
    if job_id is not None:
        statement = statement.where(Checkpoint.job_id == job_id)
    if stage is not None:
        statement = statement.where(Checkpoint.stage == stage)
    if kinds:
        statement = statement.where(Checkpoint.kind.in_(kinds))
    if pinned is not None:
        statement = statement.where(Checkpoint.pinned == pinned)
    return fetch_page(session, statement, limit=limit)


def list_students(session: Session, job_ids: Collection[str]) -> dict[str, list[Checkpoint]]:
    """The checkpoints of kind `final` and `best` of each of these jobs, newest first."""
    statement = sa.select(Checkpoint).where(Checkpoint.job_id.in_(job_ids), Checkpoint.kind.in_(("final", "best")))
    students: dict[str, list[Checkpoint]] = {job_id: [] for job_id in job_ids}
    for checkpoint in session.scalars(statement.order_by(Checkpoint.id.desc())):
        students[checkpoint.job_id].append(checkpoint)
    return students


def list_saved_stages(session: Session, job_id: str) -> list[int]:
    """The stages, counted from 0, of whose end the job has a state of its own: where others may begin."""
    statement = sa.select(Checkpoint.stage).where(Checkpoint.job_id == job_id, Checkpoint.kind == "stage")
    return [stage for stage in session.scalars(statement.distinct().order_by(Checkpoint.stage)) if stage is not None]


def lock_surplus(session: Session, job_id: str, *, keep_states: int) -> list[Checkpoint]:
    """A job's checkpoints that later ones replace and nobody has pinned: of kind `training` all but the newest
    `keep_states`, of kind `best` all but the newest, which is the best of all. The last state of all stays, whatever
    its kind.

    Their rows are locked: no new job can refer to one until the transaction ends, so that the caller may check whether
    a job does.
    """
    statement = sa.select(Checkpoint.id).where(Checkpoint.job_id == job_id)
    states = statement.where(Checkpoint.kind == "training").order_by(Checkpoint.step.desc(), Checkpoint.id.desc())
    if not keep_states:
        newest_stage = sa.select(sa.func.max(Checkpoint.step)).where(
            Checkpoint.job_id == job_id, Checkpoint.kind == "stage"
        )
        states = states.where(Checkpoint.step <= newest_stage.scalar_subquery())
    best = statement.where(Checkpoint.kind == "best").order_by(Checkpoint.id.desc())
    surplus = [*session.scalars(states.offset(keep_states)), *session.scalars(best.offset(1))]
    locked = sa.select(Checkpoint).where(Checkpoint.id.in_(surplus), Checkpoint.pinned.is_(False)).with_for_update()
    return list(session.scalars(locked.order_by(Checkpoint.id))) if surplus else []


def replace_by_tombstones(session: Session, checkpoints: Collection[Checkpoint], reason: DeletionReason) -> None:
    """Put tombstones in the place of checkpoints; their files are removed after the commit."""
    for checkpoint in checkpoints:
        session.add(
            CheckpointTombstone(
                id=checkpoint.id,
                project=checkpoint.project,
                job_id=checkpoint.job_id,
                store_key=checkpoint.store_key,
                reason=reason,
            )
        )
        session.delete(checkpoint)
    session.flush()


def has_tombstone(session: Session, store_key: str) -> bool:
    """Whether the checkpoint that was stored under this key has been deleted."""
    statement = sa.select(CheckpointTombstone.id).where(CheckpointTombstone.store_key == store_key)
    return session.scalars(statement).one_or_none() is not None


def list_unremoved(session: Session, *, limit: int) -> dict[str, str]:
    """The store keys of deleted checkpoints whose files may still be there, by the id of the checkpoint."""
    statement = sa.select(CheckpointTombstone.id, CheckpointTombstone.store_key).where(
        CheckpointTombstone.files_removed.is_(False)
    )
    rows = session.execute(statement.order_by(CheckpointTombstone.deleted_at).limit(limit)).all()
    return {row.id: row.store_key for row in rows}


def record_removed(session: Session, checkpoint_ids: Collection[str]) -> None:
    """Record that the files of these deleted checkpoints are removed."""
    statement = sa.update(CheckpointTombstone).where(CheckpointTombstone.id.in_(checkpoint_ids))
    session.execute(statement.values(files_removed=True))


def delete_old_tombstones(session: Session, *, limit: int) -> int:
    """Delete tombstones that are older than :data:`TOMBSTONE_SECONDS`, at most so many.

    Returns:
        how many were deleted.
    """
    old = sa.select(CheckpointTombstone.id).where(
        CheckpointTombstone.files_removed.is_(True), CheckpointTombstone.deleted_at < db_now(-TOMBSTONE_SECONDS)
    )
    statement = sa.delete(CheckpointTombstone).where(CheckpointTombstone.id.in_(old.limit(limit)))
    return len(session.execute(statement.returning(CheckpointTombstone.id)).all())


def _by_id(project: str, checkpoint_id: str) -> sa.Select[Checkpoint]:
    return sa.select(Checkpoint).where(Checkpoint.id == checkpoint_id, Checkpoint.project == project)


def _one(session: Session, project: str, checkpoint_id: str, statement: sa.Select[Checkpoint]) -> Checkpoint:
    checkpoint = session.scalars(statement, execution_options={"populate_existing": True}).one_or_none()
    if checkpoint is not None:
        return checkpoint
    tombstone = session.get(CheckpointTombstone, checkpoint_id)
    if tombstone is None or tombstone.project != project:
        raise CheckpointNotFound
    raise CheckpointExpired(f"{_SENTENCES[tombstone.reason]} at {tombstone.deleted_at:%Y-%m-%dT%H:%M:%SZ}.")
