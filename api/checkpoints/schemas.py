"""Checkpoints as the API shows them."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Literal

from sqlalchemy.orm import Session

from api.pagination import Page, Resource
from domain.checkpoints.models import Checkpoint
from domain.jobs.expiry import expiry_times
from pocl.events import CheckpointKind


class CheckpointView(Resource):
    """Weights that `from_pretrained` loads. The files of a checkpoint never change."""

    id: str
    """The id by which a later job names the checkpoint as its teacher or student."""
    object: Literal["checkpoint"] = "checkpoint"
    """The kind of the resource."""
    job_id: str
    """The job that saved the checkpoint."""
    attempt: int
    """The attempt of the job that saved it, counted from 1."""
    kind: CheckpointKind
    """What the checkpoint is; `training` and `stage` hold the full training state besides the weights."""
    stage: int | None
    """The stage in which the checkpoint was saved, counted from 0; null outside of any stage."""
    step: int
    """The number of optimiser steps that were done when the checkpoint was saved."""
    size_bytes: int
    """The size of all files together, in bytes."""
    manifest_sha256: str
    """The SHA-256 digest of the checkpoint's `manifest.json`, hexadecimal; the manifest has that of each file."""
    pinned: bool
    """Whether the checkpoint is pinned: a pinned one is not deleted."""
    expires_at: datetime | None
    """When the retention policy deletes the checkpoint, as things stand; null while it keeps it, and before the job has
    ended. A pin, a job that needs it, or another policy changes that."""
    created_at: datetime
    """When the checkpoint was committed."""


_COLUMNS = tuple(CheckpointView.model_fields.keys() - {"object", "expires_at"})


def checkpoint_presenter(
    session: Session, project: str, rows: Sequence[Checkpoint]
) -> Callable[[Checkpoint], CheckpointView]:
    """What makes the view of each of these checkpoints of a project."""
    expiry = expiry_times(session, project, rows)

    def present(row: Checkpoint) -> CheckpointView:
        columns = {name: getattr(row, name) for name in _COLUMNS}
        return CheckpointView(**columns, expires_at=expiry.get(row.id))

    return present


class CheckpointPage(Page[CheckpointView, str]):
    """Checkpoints, newest first."""
