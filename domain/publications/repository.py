"""Queries for publications. No function commits."""

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.publications.models import UNDER_WAY, Publication


def get_publication(session: Session, job_id: str) -> Publication | None:
    """The publication of a job as the row is now; null where nothing of the job is pushed."""
    return session.get(Publication, job_id, populate_existing=True)


def lock_publication(session: Session, job_id: str) -> Publication | None:
    """Like :func:`get_publication`, with a row lock until the transaction ends. Lock the job before."""
    return session.get(Publication, job_id, populate_existing=True, with_for_update=True)


def pushed_checkpoints(session: Session, checkpoint_ids: Collection[str]) -> set[str]:
    """Those of these checkpoints whose files a publication still needs."""
    statement = sa.select(Publication.checkpoint_id).where(
        Publication.checkpoint_id.in_(checkpoint_ids), Publication.state.in_(UNDER_WAY)
    )
    return {each for each in session.scalars(statement) if each is not None}
