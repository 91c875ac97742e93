"""Queries for exports. No function commits."""

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import KeysetPage, fetch_page
from domain.errors import NotFound
from domain.exports.models import UNDER_WAY, CheckpointExport
from pocl.spec import GgufFormat


class ExportNotFound(NotFound):
    """The checkpoint has no export of this id."""

    code = "export_not_found"


def get_export(session: Session, project: str, checkpoint_id: str, export_id: str) -> CheckpointExport:
    """An export of a checkpoint, as the row is now.

    Raises:
        ExportNotFound: the checkpoint has no such export.
    """
    row = session.get(CheckpointExport, export_id, populate_existing=True)
    if row is None or (row.project, row.checkpoint_id) != (project, checkpoint_id):
        raise ExportNotFound
    return row


def lock_export(session: Session, export_id: str) -> CheckpointExport | None:
    """An export with a row lock until the transaction ends; null where there is none. Lock a job before it."""
    return session.get(CheckpointExport, export_id, populate_existing=True, with_for_update=True)


def lock_export_in(session: Session, checkpoint_id: str, export_format: GgufFormat) -> CheckpointExport | None:
    """The export of a checkpoint in a format, with a row lock until the transaction ends; null where there is none."""
    statement = sa.select(CheckpointExport).where(
        CheckpointExport.checkpoint_id == checkpoint_id, CheckpointExport.format == export_format
    )
    return session.scalars(statement.with_for_update(), execution_options={"populate_existing": True}).one_or_none()


def list_exports(
    session: Session, checkpoint_id: str, *, limit: int, after: str | None = None
) -> KeysetPage[CheckpointExport]:
    """The exports of a checkpoint, newest first, after the one with the id `after`."""
    statement = sa.select(CheckpointExport).where(CheckpointExport.checkpoint_id == checkpoint_id)
    if after is not None:
        statement = statement.where(CheckpointExport.id < after)
    return fetch_page(session, statement.order_by(CheckpointExport.id.desc()), limit=limit)


def count_exports_under_way(session: Session, project: str) -> int:
    """How many exports of a project wait for a worker, or are made."""
    statement = sa.select(sa.func.count()).where(
        CheckpointExport.project == project, CheckpointExport.state.in_(UNDER_WAY)
    )
    return session.scalar(statement) or 0


def exported_checkpoints(session: Session, checkpoint_ids: Collection[str]) -> set[str]:
    """Those of these checkpoints whose files an export still needs."""
    statement = sa.select(CheckpointExport.checkpoint_id).where(
        CheckpointExport.checkpoint_id.in_(checkpoint_ids), CheckpointExport.state.in_(UNDER_WAY)
    )
    return set(session.scalars(statement))


def exported_bytes(session: Session, checkpoint_ids: Collection[str]) -> int:
    """The size of the exports of these checkpoints together, in bytes."""
    statement = sa.select(sa.func.sum(CheckpointExport.size_bytes)).where(
        CheckpointExport.checkpoint_id.in_(checkpoint_ids)
    )
    return int(session.scalar(statement) or 0)


def count_open_exports(session: Session) -> dict[str, int]:
    """How many exports of all projects are in each state but `complete`."""
    counted = session.execute(
        sa.select(CheckpointExport.state, sa.func.count())
        .where(CheckpointExport.state != "complete")
        .group_by(CheckpointExport.state)
    )
    return {"pending": 0, "running": 0, "failed": 0, **dict(counted.all())}
