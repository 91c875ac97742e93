"""Exports as clients ask for them: a new one, another try of one that failed, its deletion. No function commits."""

import json
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore
from domain.checkpoints.models import Checkpoint, CheckpointTombstone
from domain.checkpoints.repository import get_checkpoint, get_checkpoint_for_share
from domain.db import db_now
from domain.errors import QuotaExceeded, engine_refusals
from domain.exports.models import LIFETIME, UNDER_WAY, CheckpointExport
from domain.exports.repository import ExportNotFound, count_exports_under_way, lock_export, lock_export_in
from domain.ids import new_id
from domain.jobs.quotas import admit_file
from domain.jobs.transitions import lock_job, record_events
from domain.jobs.usage import bytes_of_job
from domain.settings import Settings
from pocl.errors import GgufUnsupported
from pocl.inspect import explain_no_gguf
from pocl.spec import GgufFormat

_CONFIG_FILE: Final = "config.json"
_MAX_CONFIG_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class ExportRequest:
    """What came of a request for an export."""

    export: CheckpointExport
    changed: bool
    """Whether it is new, or tried again; false where there was one that is under way or complete."""


def check_exportable(store: ArtifactStore, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose family cannot be written as GGUF. Where its config cannot be read nothing is refused
    here: the export then says what is wrong.

    Raises:
        EngineRefusal: with the code `gguf_unsupported`.
        ArtifactStoreUnavailable, ArtifactStoreRefused: the store does not answer.
    """
    try:
        family = _family_of(store, checkpoint.store_key)
    except (ArtifactNotFound, ArtifactCorrupt, ValueError, RecursionError):
        return
    if isinstance(family, str) and (reason := explain_no_gguf(family)) is not None:
        with engine_refusals():
            raise GgufUnsupported(reason)


def _family_of(store: ArtifactStore, store_key: str) -> Any:
    listed = next((file for file in store.manifest(store_key).files if file.path == _CONFIG_FILE), None)
    if listed is None or listed.size > _MAX_CONFIG_BYTES:
        return None
    config = json.loads(b"".join(store.read(store_key, _CONFIG_FILE, 0, listed.size)))
    return config.get("model_type") if isinstance(config, dict) else None


def request_export(
    session: Session, settings: Settings, project: str, checkpoint_id: str, export_format: GgufFormat
) -> ExportRequest:
    """Have a checkpoint exported, unless it is already in this format. One that failed is tried again, at once and for
    as long as a new one.

    Raises:
        CheckpointNotFound: the project has no such checkpoint.
        CheckpointExpired: it was deleted.
        QuotaExceeded: the project has as many exports under way as it may, or its files take as much as they may.
        Unauthenticated: the project was deleted since the sender was identified.
    """
    # The project first, as a submission locks them. The lock on the checkpoint keeps others from deleting it.
    present = _find_settled(session, project, checkpoint_id, export_format)
    if present is not None:
        return ExportRequest(present, changed=False)
    admit_file(session, project, 1)
    checkpoint = get_checkpoint_for_share(session, project, checkpoint_id)
    row = lock_export_in(session, checkpoint_id, export_format)
    if row is not None and row.state != "failed":
        return ExportRequest(row, changed=False)
    if count_exports_under_way(session, project) >= settings.max_exports_queued:
        raise QuotaExceeded(
            f"The project has {settings.max_exports_queued} exports under way, and may have no more: wait until one has"
            " ended, or delete one."
        )
    now, until = session.execute(sa.select(db_now(), db_now(LIFETIME.total_seconds()))).one()
    if row is None:
        row = CheckpointExport(
            id=new_id("exp"),
            project=project,
            job_id=checkpoint.job_id,
            checkpoint_id=checkpoint.id,
            format=export_format,
            expires_at=until,
        )
        session.add(row)
    else:
        row.state, row.attempts, row.not_before, row.expires_at = "pending", 0, now, until
    session.flush()
    return ExportRequest(row, changed=True)


def delete_export(session: Session, project: str, checkpoint_id: str, export_id: str) -> str | None:
    """Delete an export. The worker that makes it finds that out, and stops.

    Returns:
        the store key whose files may be removed after the commit; null where it has none. Where nobody does, the
        scheduler removes them.

    Raises:
        CheckpointNotFound, CheckpointExpired: the project has no such checkpoint, or no more.
        ExportNotFound: the checkpoint has no such export.
    """
    checkpoint = get_checkpoint(session, project, checkpoint_id)
    # The job first: the worker that records an export locks them in this order too.
    job = lock_job(session, checkpoint.job_id)
    row = lock_export(session, export_id)
    if row is None or (row.project, row.checkpoint_id) != (project, checkpoint_id):
        raise ExportNotFound
    store_key = row.store_key
    if store_key is not None:
        session.add(
            CheckpointTombstone(id=row.id, project=project, job_id=row.job_id, store_key=store_key, reason="requested")
        )
    session.delete(row)
    session.flush()
    if job is not None and store_key is not None:
        record_events(session, job, [], token=None, changes={"stored_bytes": bytes_of_job(job.id)})
    return store_key


def _find_settled(
    session: Session, project: str, checkpoint_id: str, export_format: GgufFormat
) -> CheckpointExport | None:
    """The export of a checkpoint in a format that is under way or complete; null where there is none."""
    get_checkpoint(session, project, checkpoint_id)
    statement = sa.select(CheckpointExport).where(
        CheckpointExport.checkpoint_id == checkpoint_id,
        CheckpointExport.format == export_format,
        CheckpointExport.state.in_((*UNDER_WAY, "complete")),
    )
    return session.scalars(statement).one_or_none()
