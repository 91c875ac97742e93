"""Publications by schedulers: which is due, what came of an attempt, and another try. No function commits.

A publication is pushed by one scheduler at a time, which holds a lease on it with a fencing token. One that is killed
leaves the lease to run out; the next attempt finds what the branch has already, and makes no second commit of it.
Every change that clients see raises the version of the job, whose row is locked first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.checkpoints.models import Checkpoint
from domain.db import db_now
from domain.errors import Conflict, LostLease, NotFound
from domain.jobs.actions import ActionResult, lock_project_job
from domain.jobs.models import Job
from domain.jobs.transitions import NewEvent, lock_job, record_events
from domain.publications.models import LIFETIME, UNDER_WAY, Publication
from domain.publications.repository import lock_publication

PUBLISHED: Final = "published"
PUBLICATION_FAILED: Final = "publication_failed"
"""The types of the events in the history of a job."""
_MAX_CANDIDATES: Final = 16
_MAX_GIVEN_UP: Final = 100
_GRACE_SECONDS: Final = 3600
"""So long after its time an attempt is still waited for."""
_BROKEN_OFF: Final = ("upload_broken_off", "Each attempt was broken off with its scheduler, for a day.")
_NOT_PUSHED: Final = (
    "not_pushed_in_time",
    "No scheduler pushed it within a day: have the operator see that one has a token of the Hub.",
)


class PublicationNotFound(NotFound):
    """Nothing of this job is pushed to the Hub: it has not succeeded, or its `export.hub` is null."""

    code = "publication_not_found"


class AlreadyPublished(Conflict):
    """The repository has the student already: push it again by a retry of the job."""

    code = "already_published"


class PublishedCheckpointDeleted(Conflict):
    """The checkpoint that would be pushed is gone: retry the job to make it again."""

    code = "published_checkpoint_deleted"


@dataclass(frozen=True)
class DuePublication:
    """A publication that a scheduler holds the lease on."""

    job_id: str
    lease_token: int
    repo: str
    branch: str
    private: bool
    store_key: str
    """The directory of the files, relative to the artifact store."""
    attempts: int
    """The attempts since the job succeeded, this one included."""


_IS_DUE: Final = sa.or_(
    sa.and_(Publication.state == "pending", Publication.not_before <= db_now()),
    sa.and_(Publication.state == "uploading", Publication.lease_expires_at <= db_now()),
)


def has_due_publication(session: Session) -> bool:
    """Whether :func:`claim_publication` would find anything."""
    return session.scalars(sa.select(Publication.job_id).where(_IS_DUE).limit(1)).one_or_none() is not None


def claim_publication(session: Session, *, lease_seconds: float) -> DuePublication | None:
    """Take the lease on the publication that has been due for the longest; null where none is due."""
    due = sa.select(Publication.job_id).where(_IS_DUE).order_by(Publication.not_before).limit(_MAX_CANDIDATES)
    for job_id in session.scalars(due).all():
        job = lock_job(session, job_id)
        still_due = sa.select(Publication).where(Publication.job_id == job_id, _IS_DUE).with_for_update()
        row = session.scalars(still_due, execution_options={"populate_existing": True}).one_or_none()
        if job is None or row is None or row.store_key is None:
            # Another scheduler has taken it meanwhile, or it was deleted.
            continue
        now, until = session.execute(sa.select(db_now(), db_now(lease_seconds))).one()
        if row.attempts and row.expires_at <= now:
            _fail(session, job, row, *_BROKEN_OFF)
            continue
        row.state, row.lease_expires_at = "uploading", until
        row.lease_token += 1
        row.attempts += 1
        _record(session, job)
        return DuePublication(
            job_id,
            row.lease_token,
            row.repo,
            row.branch,
            private=row.private,
            store_key=row.store_key,
            attempts=row.attempts,
        )
    return None


def renew_publication(session: Session, due: DuePublication, *, lease_seconds: float) -> None:
    """Renew the lease.

    Raises:
        LostLease: another scheduler pushes by now, or the job was deleted.
    """
    renewed = session.execute(
        sa.update(Publication)
        .where(Publication.job_id == due.job_id, Publication.lease_token == due.lease_token)
        .where(Publication.state == "uploading")
        .values(lease_expires_at=db_now(lease_seconds))
        .returning(Publication.job_id),
        execution_options={"synchronize_session": False},
    ).all()
    if not renewed:
        raise LostLease


def record_published(session: Session, due: DuePublication, *, commit: str, url: str) -> None:
    """Record that the branch has the files of the student, by this commit.

    Raises:
        LostLease: as of :func:`renew_publication`.
    """
    job, row = _lock_leased(session, due)
    row.state, row.lease_expires_at, row.error = "published", None, None
    row.commit, row.url = commit[:64], url[:1000]
    row.published_at = session.scalars(sa.select(db_now())).one()
    _record(session, job, NewEvent(PUBLISHED, {**_described(row), "url": row.url, "commit": row.commit}))


def record_failed_push(
    session: Session, due: DuePublication, code: str, message: str, *, wait_seconds: float | None
) -> bool:
    """Record that an attempt failed; whether it was the last.

    Args:
        wait_seconds: after how long it is tried again, unless its time is over by then; null: not again.

    Raises:
        LostLease: as of :func:`renew_publication`.
    """
    job, row = _lock_leased(session, due)
    now = session.scalars(sa.select(db_now())).one()
    again = None if wait_seconds is None else now + timedelta(seconds=wait_seconds)
    if again is not None and again < row.expires_at:
        row.state, row.lease_expires_at = "pending", None
        row.not_before, row.error = again, {"code": code, "message": message}
        _record(session, job)
        return False
    given_up = "" if again is None else f" It was given up after {row.attempts} attempts in a day."
    _fail(session, job, row, code, message + given_up)
    return True


def release_publication(session: Session, due: DuePublication) -> None:
    """Leave an attempt that was broken off by the end of this scheduler to the next one.

    Raises:
        LostLease: as of :func:`renew_publication`.
    """
    job, row = _lock_leased(session, due)
    row.state, row.lease_expires_at = "pending", None
    row.attempts -= 1
    row.not_before = session.scalars(sa.select(db_now())).one()
    _record(session, job)


def give_up_publications(session: Session) -> int:
    """Give up publications that no scheduler has pushed in their time, so that their files are not kept for ever; how
    many.
    """
    overdue = sa.select(Publication.job_id).where(
        Publication.state.in_(UNDER_WAY),
        Publication.expires_at <= db_now(-_GRACE_SECONDS),
        sa.or_(Publication.lease_expires_at.is_(None), Publication.lease_expires_at <= db_now()),
    )
    given_up = 0
    for job_id in session.scalars(overdue.limit(_MAX_GIVEN_UP)).all():
        job = lock_job(session, job_id)
        row = lock_publication(session, job_id)
        if job is not None and row is not None and row.state in UNDER_WAY:
            _fail(session, job, row, *_NOT_PUSHED)
            given_up += 1
    return given_up


def retry_publication(session: Session, project: str, job_id: str) -> ActionResult:
    """Have a publication that failed tried again, at once and for as long as a new one. One that is under way stays.

    Raises:
        JobNotFound: the project has no such job.
        PublicationNotFound: nothing of it is pushed.
        AlreadyPublished: it has been.
        PublishedCheckpointDeleted: its files are gone.
    """
    job = lock_project_job(session, project, job_id)
    row = lock_publication(session, job.id)
    if row is None:
        raise PublicationNotFound
    if row.state in UNDER_WAY:
        return ActionResult(job, changed=False)
    if row.state == "published":
        raise AlreadyPublished
    if row.checkpoint_id is None or session.get(Checkpoint, row.checkpoint_id) is None:
        raise PublishedCheckpointDeleted
    now, until = session.execute(sa.select(db_now(), db_now(LIFETIME.total_seconds()))).one()
    row.state, row.attempts, row.not_before, row.expires_at = "pending", 0, now, until
    return ActionResult(_record(session, job), changed=True)


def _lock_leased(session: Session, due: DuePublication) -> tuple[Job, Publication]:
    job = lock_job(session, due.job_id)
    row = lock_publication(session, due.job_id)
    if job is None or row is None or (row.lease_token, row.state) != (due.lease_token, "uploading"):
        raise LostLease
    return job, row


def _fail(session: Session, job: Job, row: Publication, code: str, message: str) -> None:
    row.state, row.lease_expires_at = "failed", None
    row.error = {"code": code, "message": message}
    _record(session, job, NewEvent(PUBLICATION_FAILED, {**_described(row), "error": row.error}))


def _described(row: Publication) -> Mapping[str, Any]:
    return {"repo": row.repo, "branch": row.branch, "checkpoint": row.checkpoint_id}


def _record(session: Session, job: Job, *events: NewEvent) -> Job:
    session.flush()
    return record_events(session, job, events, token=None)
