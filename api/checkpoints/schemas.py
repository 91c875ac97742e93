"""Checkpoints as the API shows them."""

from datetime import datetime
from typing import Literal

from api.pagination import Page, Resource
from pocl.events import CheckpointKind


class CheckpointView(Resource):
    """Weights that `from_pretrained` loads. A checkpoint never changes."""

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
    created_at: datetime
    """When the checkpoint was committed."""


class CheckpointPage(Page[CheckpointView, str]):
    """Checkpoints, newest first."""
