"""Deletion and pinning of single checkpoints, and of those that later ones replace."""

from collections.abc import Collection
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints import repository as checkpoints
from domain.checkpoints.models import Checkpoint, DeletionReason
from domain.errors import Conflict
from domain.exports.repository import exported_checkpoints
from domain.jobs.models import Job
from domain.jobs.repository import list_other_jobs_needing
from domain.jobs.transitions import NewEvent, lock_job, record_events
from domain.jobs.usage import bytes_of_job
from domain.publications.repository import pushed_checkpoints
from pocl.events import RESUMABLE_KINDS

_MAX_NAMED: Final = 10


class CheckpointIsNeeded(Conflict):
    """Jobs, an export or a push to the Hub need the checkpoint: wait for them, or cancel or delete the jobs."""

    code = "checkpoint_is_needed"


class CheckpointIsPinned(Conflict):
    """The checkpoint is pinned: unpin it first."""

    code = "checkpoint_is_pinned"


def pin_checkpoint(session: Session, project: str, checkpoint_id: str, *, pinned: bool) -> Checkpoint:
    """Pin a checkpoint, so that neither the retention policy nor a client deletes it, or unpin it.

    Raises:
        CheckpointNotFound: the project has no such checkpoint.
        CheckpointExpired: it was deleted.
    """
    checkpoint = checkpoints.lock_checkpoint(session, project, checkpoint_id)
    checkpoint.pinned = pinned
    session.flush()
    return checkpoint


def delete_checkpoint(session: Session, project: str, checkpoint_id: str) -> str:
    """Delete a checkpoint that is not pinned and that no job needs.

    Returns:
        the store key whose files may be removed after the commit. Where nobody does, the scheduler removes them.

    Raises:
        CheckpointNotFound: the project has no such checkpoint.
        CheckpointExpired: it was deleted already.
        CheckpointIsPinned: it is pinned.
        CheckpointIsNeeded: naming the jobs and why they need it, or that it is exported or pushed to the Hub.
    """
    job_id = checkpoints.get_checkpoint(session, project, checkpoint_id).job_id
    # The job first: an attempt that saves a state locks them in this order too.
    job = lock_job(session, job_id)
    checkpoint = checkpoints.lock_checkpoint(session, project, checkpoint_id)
    if checkpoint.pinned:
        raise CheckpointIsPinned
    if job is not None and is_state_of_live_job(job, checkpoint):
        raise CheckpointIsNeeded(
            f"The job {job_id} has not ended and would resume from this training state: wait for it, or cancel it."
        )
    if pushed_checkpoints(session, [checkpoint.id]):
        raise CheckpointIsNeeded(
            f"It is pushed to the Hub: wait until `publication` of the job {job_id} is published or failed."
        )
    if exported_checkpoints(session, [checkpoint.id]):
        raise CheckpointIsNeeded("It is exported: wait until its exports have ended, or delete them.")
    others = list_other_jobs_needing(session, checkpoint)
    if others:
        listed = ", ".join(others[:_MAX_NAMED])
        more = f" and {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
        raise CheckpointIsNeeded(
            f"Jobs use the checkpoint as a model or start from it: {listed}{more}. Wait for them, cancel them, or"
            " delete those that ended."
        )
    discard_checkpoints(session, job, [checkpoint], "requested")
    return checkpoint.store_key


def is_state_of_live_job(job: Job, checkpoint: Checkpoint) -> bool:
    """Whether the job that saved a training state has not ended, so that it may resume from it."""
    return not job.ended and checkpoint.kind in RESUMABLE_KINDS


def discard_checkpoints(
    session: Session, job: Job | None, discarded: Collection[Checkpoint], reason: DeletionReason
) -> None:
    """Put tombstones in the place of checkpoints of one job, and record their deletion in its history.

    Args:
        job: locked; null where it is gone.
    """
    if not discarded:
        return
    data = [{"id": each.id, "kind": each.kind, "step": each.step, "reason": reason} for each in discarded]
    checkpoints.replace_by_tombstones(session, discarded, reason)
    if job is not None:
        events = [NewEvent("checkpoint_deleted", each) for each in data]
        record_events(session, job, events, token=None, changes={"stored_bytes": bytes_of_job(job.id)})


def discard_surplus(session: Session, job_id: str, *, token: int, keep_states: int) -> list[str]:
    """Put tombstones in the place of a job's checkpoints that later ones replace, for the attempt that holds the job.
    One that is pinned, or that another job or an export needs, stays.

    The history has no event of it, since it follows from those of the checkpoints that took their place.

    Args:
        keep_states: how many checkpoints of kind `training` the job keeps.

    Returns:
        the store keys whose files may be removed after the commit.

    Raises:
        LostLease: the attempt no longer holds the job.
    """
    replaced = checkpoints.lock_surplus(session, job_id, keep_states=keep_states)
    exported = exported_checkpoints(session, [each.id for each in replaced])
    surplus = [each for each in replaced if each.id not in exported and not list_other_jobs_needing(session, each)]
    if surplus:
        job = session.scalars(sa.select(Job).where(Job.id == job_id)).one()
        checkpoints.replace_by_tombstones(session, surplus, "surplus")
        record_events(session, job, [], token=token, changes={"stored_bytes": bytes_of_job(job_id)})
    return [each.store_key for each in surplus]
