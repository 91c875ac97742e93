"""The rows of trackers: made with their job, and marked where the job changes its state. No function commits."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from domain.trackers.models import JobTracker, TaggedTracker, TrackerOptions

_TRACKERS: Final = TypeAdapter(tuple[TaggedTracker, ...])


def parse_trackers(stored: Sequence[Mapping[str, Any]]) -> tuple[TrackerOptions, ...]:
    """The options of trackers as a row of a job has them.

    Raises:
        pydantic.ValidationError: another version wrote them.
    """
    return _TRACKERS.validate_python(stored)


def add_trackers(session: Session, job_id: str, trackers: Sequence[TrackerOptions]) -> None:
    """Add the rows of the trackers that a new job asks for."""
    session.add_all(
        JobTracker(
            job_id=job_id,
            kind=options.kind,
            position=position,
            channel=options.channel,
            options=options.model_dump(mode="json"),
            last_steps={},
        )
        for position, options in enumerate(trackers)
    )


def mark_pending(session: Session, job_id: str) -> None:
    """Have the trackers of a job looked at once more: it changed its state, and no worker holds it now."""
    session.execute(
        sa.update(JobTracker).where(JobTracker.job_id == job_id, JobTracker.state == "open").values(pending=True)
    )


def list_trackers(session: Session, job_id: str) -> Sequence[JobTracker]:
    """The trackers of a job in the order in which it names them."""
    return session.scalars(sa.select(JobTracker).where(JobTracker.job_id == job_id).order_by(JobTracker.position)).all()
