"""Actions of clients on a job: cancel, pause, resume, update, delete. Each is idempotent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.checkpoints.repository import replace_by_tombstones
from domain.db import db_now
from domain.errors import ActionRefused, Conflict, IllegalTransition, JobNotFound, Unprocessable
from domain.exports.repository import exported_checkpoints
from domain.jobs.models import Job
from domain.jobs.repository import list_other_jobs_needing
from domain.jobs.states import ALLOWED_ACTIONS, CANCELLED, TRANSITIONS, JobStatus, PauseAt
from domain.jobs.transitions import NewEvent, lock_job, record_events, transition
from domain.publications.repository import pushed_checkpoints
from pocl.errors import FieldError


class JobIsLive(ActionRefused):
    """The job has not ended: cancel it first."""

    code = "job_is_live"


class JobIsNeeded(Conflict):
    """A job that has not ended, or a push to the Hub, needs a checkpoint of this one, or one is pinned: wait for it, or
    unpin."""

    code = "job_is_needed"


@dataclass(frozen=True)
class ActionResult:
    """A job after an action, and whether the action changed it: an action that is repeated does not."""

    job: Job
    changed: bool


def cancel_job(session: Session, project: str, job_id: str) -> ActionResult:
    """End a waiting job at once; request that the worker end one that it holds.

    A repeated request changes nothing.

    Raises:
        JobNotFound: the project has no such job.
        IllegalTransition: the job has ended in another state.
    """
    job = lock_project_job(session, project, job_id)
    if job.status in (JobStatus.CANCELLING, JobStatus.CANCELLED):
        return ActionResult(job, changed=False)
    changes = {"cancel_requested_at": db_now()}
    if JobStatus.CANCELLING in TRANSITIONS[job.status]:
        return ActionResult(transition(session, job, JobStatus.CANCELLING, changes=changes), changed=True)
    return ActionResult(transition(session, job, JobStatus.CANCELLED, reason=CANCELLED, changes=changes), changed=True)


def pause_job(session: Session, project: str, job_id: str, at: PauseAt) -> ActionResult:
    """Request that the worker save and release the job, now or at the end of the stage.

    A repeated request changes nothing; a job that would pause at the end of its stage may still be paused now.

    Raises:
        JobNotFound: the project has no such job.
        IllegalTransition: no worker holds the job.
    """
    job = lock_project_job(session, project, job_id)
    if job.status is JobStatus.PAUSED or (job.status is JobStatus.PAUSING and job.pause_at in (at, "now")):
        return ActionResult(job, changed=False)
    if job.status is JobStatus.PAUSING:
        return ActionResult(
            record_events(session, job, [NewEvent("pause", {"at": at})], token=None, changes={"pause_at": at}), True
        )
    return ActionResult(transition(session, job, JobStatus.PAUSING, changes={"pause_at": at}), changed=True)


def resume_job(session: Session, project: str, job_id: str) -> ActionResult:
    """Put a paused job back into the queue; it resumes from its newest training state.

    A repeated request changes nothing.

    Raises:
        JobNotFound: the project has no such job.
        IllegalTransition: the job is not paused.
    """
    job = lock_project_job(session, project, job_id)
    if job.status in (JobStatus.QUEUED, JobStatus.PREPARING, JobStatus.RUNNING, JobStatus.RECOVERING):
        return ActionResult(job, changed=False)
    if job.status is JobStatus.PAUSING:
        raise IllegalTransition(
            "The job is still being paused: resume it once it is.", allowed=ALLOWED_ACTIONS[job.status]
        )
    return ActionResult(transition(session, job, JobStatus.QUEUED), changed=True)


def update_job(session: Session, project: str, job_id: str, changes: Mapping[str, Any]) -> Job:
    """Change name, labels, priority or retention; a field that `changes` does not name stays.

    Raises:
        JobNotFound: the project has no such job.
        Unprocessable: the job has ended, so that its priority means nothing any more.
    """
    job = lock_project_job(session, project, job_id)
    columns = {name: value for name, value in changes.items() if getattr(job, name) != value}
    if not columns:
        return job
    if "priority" in columns and job.ended:
        raise Unprocessable(field_errors=[FieldError("/priority", "job_has_ended", "an ended job waits for nothing")])
    return record_events(session, job, [NewEvent("changed", columns)], token=None, changes=columns)


def delete_job(session: Session, project: str, job_id: str) -> list[str]:
    """Delete an ended job with its history, results and checkpoints.

    Returns:
        the store keys whose files may be removed after the commit.

    Raises:
        JobNotFound: the project has no such job.
        JobIsLive: it has not ended.
        JobIsNeeded: a job that has not ended needs one of its checkpoints, or one is pinned, exported or pushed to the
            Hub.
    """
    job = lock_project_job(session, project, job_id)
    if not job.ended:
        raise JobIsLive(allowed=ALLOWED_ACTIONS[job.status])
    # The lock keeps new jobs from referring to one of the checkpoints until the transaction ends.
    own = session.scalars(sa.select(Checkpoint).where(Checkpoint.job_id == job.id).with_for_update()).all()
    if pushed_checkpoints(session, [each.id for each in own]):
        raise JobIsNeeded("Its student is pushed to the Hub: wait until its `publication` is published or failed.")
    if exported := exported_checkpoints(session, [each.id for each in own]):
        raise JobIsNeeded(
            f"Its checkpoint {min(exported)} is exported: wait until its exports have ended, or delete them."
        )
    for checkpoint in own:
        if checkpoint.pinned:
            raise JobIsNeeded(f"Its checkpoint {checkpoint.id} is pinned: unpin it first.")
        if others := list_other_jobs_needing(session, checkpoint, live_only=True):
            raise JobIsNeeded(
                f"The job {others[0]} needs its checkpoint {checkpoint.id}: wait for that job, or cancel it."
            )
    return [remove_job(session, job, own)]


def remove_job(session: Session, job: Job, checkpoints: Sequence[Checkpoint]) -> str:
    """Delete the row of an ended job with all that belongs to it, and leave tombstones of its checkpoints.

    Args:
        job, checkpoints: locked.

    Returns:
        the store key whose files may be removed after the commit.
    """
    replace_by_tombstones(session, checkpoints, "job_deleted")
    session.execute(sa.delete(Job).where(Job.id == job.id))
    return f"jobs/{job.id}"


def lock_project_job(session: Session, project: str, job_id: str) -> Job:
    """A job of the project, with a row lock until the transaction ends.

    Raises:
        JobNotFound: the project has no such job.
    """
    job = lock_job(session, job_id)
    if job is None or job.project != project:
        raise JobNotFound
    return job
