"""Checkpoints as the API shows them."""

from datetime import datetime
from typing import Literal, Self

from api.pagination import Page, Resource
from domain.checkpoints.models import Checkpoint, CheckpointKind


class CheckpointView(Resource):
    """Weights that `from_pretrained` loads. A checkpoint never changes."""

    id: str
    """A later job names it as its teacher or student."""
    object: Literal["checkpoint"] = "checkpoint"
    job_id: str
    attempt: int
    kind: CheckpointKind
    """`training` and `stage` hold the full training state as well."""
    stage: int | None
    """Counted from 0."""
    step: int
    """Optimiser steps done."""
    size_bytes: int
    manifest_sha256: str
    """Of its `manifest.json`, hexadecimal; the manifest has the digest of each file."""
    created_at: datetime

    @classmethod
    def of(cls, row: Checkpoint) -> Self:
        return cls(
            id=row.id,
            job_id=row.job_id,
            attempt=row.attempt,
            kind=row.kind,
            stage=row.stage,
            step=row.step,
            size_bytes=row.size_bytes,
            manifest_sha256=row.manifest_sha256,
            created_at=row.created_at,
        )


class CheckpointPage(Page[CheckpointView, str]):
    """Checkpoints, newest first."""
