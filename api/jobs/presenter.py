"""A job as the API shows it, with what stands in other rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from sqlalchemy.orm import Session

from api.jobs.schemas import JobView
from domain.errors import ModelMissing, ModelRefused, PathOutsideModelRoots, SpecRefused, VocabulariesDiffer
from domain.jobs import repository
from domain.jobs.models import Job
from domain.jobs.queue import QueuePosition, queue_position
from domain.settings import Settings

SPEC_ERRORS: Final = (SpecRefused, PathOutsideModelRoots, ModelMissing, ModelRefused, VocabulariesDiffer)
"""How a specification is refused."""


@contextmanager
def pointing_into(part: str) -> Iterator[None]:
    """Turn pointers into the specification into pointers into the body, where `part` holds it."""
    try:
        yield
    except SPEC_ERRORS as error:
        error.field_errors = tuple(replace(found, pointer=f"/{part}{found.pointer}") for found in error.field_errors)
        raise


def present_job(session: Session, job: Job, settings: Settings) -> JobView:
    return present_job_at(session, job, queue_position(session, job, worker_seconds=settings.lease_seconds))


def present_job_at(session: Session, job: Job, place: QueuePosition | None) -> JobView:
    """
    Args:
        place: of the job in the queue; null unless it is queued.
    """
    newest = repository.metric_series(session, job.id, points=1, from_step=job.step, to_step=job.step)
    return JobView.whole(job, place=place, newest=newest)
