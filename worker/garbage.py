"""Removal of files whose rows are gone, in bounded turns.

Rows go first, in one transaction, and leave a tombstone that names the files; the files follow; the tombstone is marked
last. A process that is killed in between leaves a tombstone that the next turn finds, and files are removed once more,
which changes nothing.
"""

import re
from typing import Final, get_args

import sqlalchemy as sa

from domain.artifacts import ArtifactStore
from domain.checkpoints.models import Checkpoint
from domain.checkpoints.repository import delete_old_tombstones, list_unremoved, record_removed
from domain.db import Database
from pocl.events import CheckpointKind

_MAX_CHECKPOINTS: Final = 200
"""How many checkpoints one turn removes: each is a directory of gigabytes."""
_MAX_TOMBSTONES: Final = 1000
_CHECKPOINT_KEY: Final = re.compile(rf"jobs/[^/]+/attempt-\d+/(?:{'|'.join(get_args(CheckpointKind))})-\d+")


def remove_deleted_checkpoints(database: Database, store: ArtifactStore) -> int:
    """Remove the files of deleted checkpoints, and tombstones that are old; the number of checkpoints whose files were
    removed.
    """
    with database.transaction(write=False) as session:
        pending = list_unremoved(session, limit=_MAX_CHECKPOINTS)
    for store_key in pending.values():
        store.remove(store_key)
    with database.transaction(write=True) as session:
        if pending:
            record_removed(session, list(pending))
        delete_old_tombstones(session, limit=_MAX_TOMBSTONES)
    return len(pending)


def remove_unnamed_checkpoints(database: Database, store: ArtifactStore, job_id: str) -> int:
    """Remove the checkpoints of an ended job that no row names: their worker was killed after it had stored them. The
    number of them.
    """
    attempts = store.list_keys(f"jobs/{job_id}")
    stored = [key for attempt in attempts for key in store.list_keys(attempt) if _CHECKPOINT_KEY.fullmatch(key)]
    with database.transaction(write=False) as session:
        named = set(session.scalars(sa.select(Checkpoint.store_key).where(Checkpoint.job_id == job_id)))
    unnamed = [key for key in stored if key not in named]
    for key in unnamed:
        store.remove(key)
    return len(unnamed)
