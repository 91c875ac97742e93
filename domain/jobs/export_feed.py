"""Exports by workers: which is due, and what came of an attempt. No function commits.

An export is made by one worker at a time, which holds a lease on it with a fencing token. Each attempt stores its files
under a key of its own, so that what an attempt leaves that lost its lease is never taken for that of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.db import db_now
from domain.errors import LostLease
from domain.exports.models import MAX_ATTEMPTS, UNDER_WAY, CheckpointExport
from domain.exports.repository import lock_export
from domain.jobs.quotas import check_room
from domain.jobs.transitions import lock_job, record_events
from domain.jobs.usage import bytes_of_job
from pocl.errors import Fault
from pocl.spec import GgufFormat

_MAX_CANDIDATES: Final = 16
_MAX_GIVEN_UP: Final = 100


@dataclass(frozen=True)
class ExportFailure:
    """Why an attempt failed."""

    code: str
    """A stable name of the reason, for programs."""
    message: str
    """One sentence for people, without paths of the service."""
    fault: Fault

    def as_json(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "fault": self.fault}


_BROKEN_OFF: Final = ExportFailure("export_broken_off", "Each attempt was broken off with its worker.", "system")
_NOT_EXPORTED: Final = ExportFailure(
    "not_exported_in_time",
    "No worker made it within a day: have the operator see that one lives that exports (POCL_WORKER_EXPORTS).",
    "system",
)


@dataclass(frozen=True)
class DueExport:
    """An export that a worker holds the lease on."""

    export_id: str
    project: str
    job_id: str
    lease_token: int
    format: GgufFormat
    checkpoint_key: str
    """The directory of the checkpoint, relative to the artifact store."""
    checkpoint_bytes: int
    attempts: int
    """The attempts since it was asked for, this one included."""

    @property
    def store_keys(self) -> str:
        """The directory of all exports of the checkpoint, relative to the artifact store."""
        return f"{self.checkpoint_key}/exports"

    @property
    def store_key(self) -> str:
        """The directory in which this attempt stores its files, relative to the artifact store."""
        return f"{self.store_keys}/{self.export_id}-{self.lease_token}"


_IS_DUE: Final = sa.or_(
    sa.and_(CheckpointExport.state == "pending", CheckpointExport.not_before <= db_now()),
    sa.and_(CheckpointExport.state == "running", CheckpointExport.lease_expires_at <= db_now()),
)


def has_due_export(session: Session) -> bool:
    """Whether :func:`claim_export` would find anything."""
    return session.scalars(sa.select(CheckpointExport.id).where(_IS_DUE).limit(1)).one_or_none() is not None


def claim_export(session: Session, *, lease_seconds: float) -> DueExport | None:
    """Take the lease on the export that has been due for the longest; null where none is due."""
    due = sa.select(CheckpointExport.id).where(_IS_DUE).order_by(CheckpointExport.not_before).limit(_MAX_CANDIDATES)
    for export_id in session.scalars(due).all():
        still_due = sa.select(CheckpointExport).where(CheckpointExport.id == export_id, _IS_DUE).with_for_update()
        row = session.scalars(still_due, execution_options={"populate_existing": True}).one_or_none()
        checkpoint = None if row is None else session.get(Checkpoint, row.checkpoint_id)
        if row is None or checkpoint is None:
            # Another worker has taken it meanwhile, or it was deleted.
            continue
        now, until = session.execute(sa.select(db_now(), db_now(lease_seconds))).one()
        if row.attempts >= MAX_ATTEMPTS or (row.attempts and row.expires_at <= now):
            _fail(row, _BROKEN_OFF)
            continue
        row.state, row.lease_expires_at = "running", until
        row.lease_token += 1
        row.attempts += 1
        session.flush()
        return DueExport(
            export_id,
            row.project,
            row.job_id,
            row.lease_token,
            row.format,
            checkpoint_key=checkpoint.store_key,
            checkpoint_bytes=checkpoint.size_bytes,
            attempts=row.attempts,
        )
    return None


def renew_export(session: Session, due: DueExport, *, lease_seconds: float) -> None:
    """Renew the lease.

    Raises:
        LostLease: another worker makes it by now, or it was deleted.
    """
    renewed = session.execute(
        sa.update(CheckpointExport)
        .where(CheckpointExport.id == due.export_id, CheckpointExport.lease_token == due.lease_token)
        .where(CheckpointExport.state == "running")
        .values(lease_expires_at=db_now(lease_seconds))
        .returning(CheckpointExport.id),
        execution_options={"synchronize_session": False},
    ).all()
    if not renewed:
        raise LostLease


def record_exported(
    session: Session, due: DueExport, *, size_bytes: int, manifest_sha256: str, notes: Sequence[str]
) -> None:
    """Record that the files of an export are whole in the artifact store, under `due.store_key`.

    Raises:
        LostLease: as of :func:`renew_export`.
        QuotaExceeded: the project's files would take more than they may.
    """
    job = lock_job(session, due.job_id)
    row = _lock_leased(session, due)
    check_room(session, due.project, size_bytes)
    row.state, row.lease_expires_at, row.error = "complete", None, None
    row.store_key, row.size_bytes, row.manifest_sha256 = due.store_key, size_bytes, manifest_sha256
    row.notes = list(notes)
    row.completed_at = session.scalars(sa.select(db_now())).one()
    session.flush()
    if job is not None:
        record_events(session, job, [], token=None, changes={"stored_bytes": bytes_of_job(job.id)})


def record_failed_export(
    session: Session, due: DueExport, failure: ExportFailure, *, wait_seconds: float | None
) -> bool:
    """Record that an attempt failed; whether it was the last.

    Args:
        wait_seconds: after how long it is tried again, unless its attempts or its time are over by then; null: not
            again.

    Raises:
        LostLease: as of :func:`renew_export`.
    """
    row = _lock_leased(session, due)
    now = session.scalars(sa.select(db_now())).one()
    again = None if wait_seconds is None else now + timedelta(seconds=wait_seconds)
    if again is None or again >= row.expires_at or row.attempts >= MAX_ATTEMPTS:
        _fail(row, failure)
        return True
    row.state, row.lease_expires_at = "pending", None
    row.not_before, row.error = again, failure.as_json()
    session.flush()
    return False


def release_export(session: Session, due: DueExport) -> None:
    """Leave an attempt that was broken off by the end of this worker to the next one.

    Raises:
        LostLease: as of :func:`renew_export`.
    """
    row = _lock_leased(session, due)
    row.state, row.lease_expires_at = "pending", None
    row.attempts -= 1
    row.not_before = session.scalars(sa.select(db_now())).one()
    session.flush()


def give_up_exports(session: Session) -> int:
    """Give up exports that no worker has made in their time, which keep their checkpoints otherwise; how many."""
    overdue = sa.select(CheckpointExport.id).where(
        CheckpointExport.state.in_(UNDER_WAY),
        CheckpointExport.expires_at <= db_now(),
        sa.or_(CheckpointExport.lease_expires_at.is_(None), CheckpointExport.lease_expires_at <= db_now()),
    )
    given_up = 0
    for export_id in session.scalars(overdue.limit(_MAX_GIVEN_UP)).all():
        row = lock_export(session, export_id)
        if row is not None and row.state in UNDER_WAY:
            _fail(row, _NOT_EXPORTED)
            given_up += 1
    session.flush()
    return given_up


def _lock_leased(session: Session, due: DueExport) -> CheckpointExport:
    row = lock_export(session, due.export_id)
    if row is None or (row.lease_token, row.state) != (due.lease_token, "running"):
        raise LostLease
    return row


def _fail(row: CheckpointExport, failure: ExportFailure) -> None:
    row.state, row.lease_expires_at, row.error = "failed", None, failure.as_json()
