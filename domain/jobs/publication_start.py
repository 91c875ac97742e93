"""The start of a publication: its row is made in the transaction in which its job succeeds."""

from collections.abc import Mapping
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.db import db_now
from domain.jobs.models import Job
from domain.publications.models import LIFETIME, Publication

CHECKPOINT_MISSING: Final = "checkpoint_missing"


def wanted_push(spec: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fields of `export.hub` in a stored specification; null where nothing is to be pushed."""
    wanted: Mapping[str, Any] | None = (spec.get("export") or {}).get("hub")
    return wanted


def start_publication(session: Session, job: Job) -> None:
    """Have the student of a job pushed that succeeds in this transaction, if its specification asks for it.

    Where the job stored no such checkpoint, the publication has failed from the beginning, and says so.
    """
    wanted = wanted_push(job.spec)
    if wanted is None:
        return
    kind = wanted["checkpoint"]
    newest = sa.select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.kind == kind)
    checkpoint = session.scalars(newest.order_by(Checkpoint.id.desc()).limit(1)).one_or_none()
    missing = {"code": CHECKPOINT_MISSING, "message": f"The job stored no checkpoint of the kind `{kind}`."}
    session.add(
        Publication(
            job_id=job.id,
            repo=wanted["repo"],
            branch=wanted["branch"],
            private=wanted["private"],
            checkpoint_id=None if checkpoint is None else checkpoint.id,
            store_key=None if checkpoint is None else checkpoint.store_key,
            state="failed" if checkpoint is None else "pending",
            error=missing if checkpoint is None else None,
            expires_at=session.scalars(sa.select(db_now(LIFETIME.total_seconds()))).one(),
        )
    )
    session.flush()
