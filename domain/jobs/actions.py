"""What clients do with a job that is there: hold it back, let it go on, rename it, forget it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.db import db_now
from domain.errors import Conflict, IllegalTransition, JobNotFound, Unprocessable
from domain.jobs.models import Job
from domain.jobs.repository import count_live_jobs_using
from domain.jobs.states import CANCELLED, HELD, TRANSITIONS, JobStatus, PauseAt
from domain.jobs.transitions import NewEvent, lock_job, record_events, transition
from pocl.errors import FieldError


class JobIsLive(Conflict):
    """The job has not ended: cancel it first."""

    code = "job_is_live"


class JobIsNeeded(Conflict):
    """A job that has not ended needs a checkpoint of this one: wait for it, or cancel it."""

    code = "job_is_needed"


@dataclass(frozen=True)
class ActionResult:
    """A job, and whether the request changed it; repeating a request does not."""

    job: Job
    changed: bool


def cancel_job(session: Session, project: str, job_id: str) -> ActionResult:
    """End a job that waits at once; ask the worker to end one that it holds.

    Repeating it changes nothing.

    Raises:
        JobNotFound: the project has no such job.
        IllegalTransition: the job has ended otherwise.
    """
    job = lock_project_job(session, project, job_id)
    if job.status in (JobStatus.CANCELLING, JobStatus.CANCELLED):
        return ActionResult(job, changed=False)
    held = job.status in HELD or job.status is JobStatus.RECOVERING
    asked = {"cancel_requested_at": db_now()}
    if held:
        return ActionResult(transition(session, job, JobStatus.CANCELLING, changes=asked), changed=True)
    return ActionResult(transition(session, job, JobStatus.CANCELLED, reason=CANCELLED, changes=asked), changed=True)


def pause_job(session: Session, project: str, job_id: str, at: PauseAt) -> ActionResult:
    """Ask the worker to save the job and let it go, now or at the end of the stage.

    Repeating it changes nothing; a job that would pause at the end of its stage may still be paused now.

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
    """Put a paused job back into the queue; it goes on from its newest training state.

    Repeating it changes nothing.

    Raises:
        JobNotFound: the project has no such job.
        IllegalTransition: the job is not paused.
    """
    job = lock_project_job(session, project, job_id)
    if job.status in (JobStatus.QUEUED, JobStatus.PREPARING, JobStatus.RUNNING, JobStatus.RECOVERING):
        return ActionResult(job, changed=False)
    if job.status is JobStatus.PAUSING:
        raise IllegalTransition("The job is still being paused: resume it once it is.", allowed=TRANSITIONS[job.status])
    return ActionResult(transition(session, job, JobStatus.QUEUED), changed=True)


def update_job(session: Session, project: str, job_id: str, changes: Mapping[str, Any]) -> Job:
    """Change name, labels or priority; what `changes` does not name stays.

    Raises:
        JobNotFound: the project has no such job.
        Unprocessable: the priority of an ended job means nothing any more.
    """
    job = lock_project_job(session, project, job_id)
    wanted = {name: value for name, value in changes.items() if getattr(job, name) != value}
    if not wanted:
        return job
    if "priority" in wanted and job.ended:
        raise Unprocessable(field_errors=[FieldError("/priority", "job_has_ended", "an ended job waits for nothing")])
    return record_events(session, job, [NewEvent("changed", wanted)], token=None, changes=wanted)


def delete_job(session: Session, project: str, job_id: str) -> list[str]:
    """Forget an ended job and all that it brought about; the store keys whose files may go after the commit.

    Raises:
        JobNotFound: the project has no such job.
        JobIsLive: it has not ended.
        JobIsNeeded: a job that has not ended needs one of its checkpoints.
    """
    job = lock_project_job(session, project, job_id)
    if not job.ended:
        raise JobIsLive
    # Locked: no new job can name one of them until this is over.
    own = session.scalars(sa.select(Checkpoint).where(Checkpoint.job_id == job.id).with_for_update()).all()
    if any(count_live_jobs_using(session, project, checkpoint=checkpoint.id) for checkpoint in own):
        raise JobIsNeeded
    session.execute(sa.delete(Job).where(Job.id == job.id))
    return [f"jobs/{job.id}"]


def lock_project_job(session: Session, project: str, job_id: str) -> Job:
    """A job of the project, kept from every other writer until the transaction ends.

    Raises:
        JobNotFound: the project has no such job.
    """
    job = lock_job(session, job_id)
    if job is None or job.project != project:
        raise JobNotFound
    return job
