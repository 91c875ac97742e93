"""Writes messages about events: a transactional outbox.

An event enters the outbox in the transaction that records it (`JobEvent.in_outbox`), and leaves it in the transaction
that writes its messages. So no event that is committed can be missed, in whatever order transactions commit, and none
is written about twice. There is no cursor that a late commit could fall behind.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final

import sqlalchemy as sa
import structlog
from pydantic import ValidationError
from sqlalchemy.orm import Session

from domain.jobs.models import Job, JobEvent
from domain.webhooks.deliveries import MAX_PENDING, add_delivery, add_refused_delivery, count_pending
from domain.webhooks.event_types import WebhookEventType, type_of_event, write_message
from domain.webhooks.models import WebhookEndpoint
from domain.webhooks.repository import database_time

_log = structlog.get_logger(__name__)

BATCH_SIZE: Final = 200
# The key of an advisory lock, any number.
_OUTBOX_LOCK: Final = 0x706F636D


def empty_outbox(session: Session, *, now: datetime, max_pending: int = MAX_PENDING) -> int:
    """Write the messages about the next events of the outbox, at most 200; the number of events that left it.

    One transaction at a time does this, so that messages about a job are written in the order of its history. Where
    another one is at it, nothing happens.

    Args:
        max_pending: how many messages may wait for one endpoint; further ones are logged and not delivered.
    """
    if not _is_alone(session):
        return 0
    statement = _in_outbox().limit(BATCH_SIZE)
    return _write_messages(session, session.execute(statement).all(), now, max_pending)


def has_events(session: Session) -> bool:
    """Whether there is an event in the outbox."""
    return session.scalars(sa.select(JobEvent.seq).where(JobEvent.in_outbox).limit(1)).one_or_none() is not None


def write_messages_about(session: Session, job_id: str) -> None:
    """Write the messages about a job that is about to be deleted, with its events in the outbox."""
    _lock(session)
    events = session.execute(_in_outbox().where(JobEvent.job_id == job_id)).all()
    _write_messages(session, events, database_time(session), MAX_PENDING)


def _in_outbox() -> sa.Select[JobEvent, Job]:
    return (
        sa.select(JobEvent, Job)
        .join(Job, Job.id == JobEvent.job_id)
        .where(JobEvent.in_outbox)
        .order_by(JobEvent.job_id, JobEvent.seq)
    )


def _write_messages(session: Session, events: Sequence[sa.Row[JobEvent, Job]], now: datetime, max_pending: int) -> int:
    if not events:
        return 0
    projects = {job.project for _, job in events}
    endpoints = session.scalars(
        sa.select(WebhookEndpoint)
        .where(WebhookEndpoint.project.in_(projects), WebhookEndpoint.status == "enabled")
        .order_by(WebhookEndpoint.id)
        # Nobody deletes an endpoint before the messages to it are committed.
        .with_for_update(read=True, key_share=True)
    ).all()
    room = {endpoint.id: max_pending - count_pending(session, endpoint.id) for endpoint in endpoints}
    for event, job in events:
        message_type = type_of_event(event)
        interested = [] if message_type is None else list(_interested(endpoints, job, message_type))
        if message_type is None or not interested:
            continue
        try:
            body = write_message(message_type, event, job)
        except ValidationError as error:
            # An event that another version recorded must not hold up those after it.
            _log.error("webhook_message_not_written", job_id=job.id, seq=event.seq, error=str(error))
            continue
        for endpoint in interested:
            add = add_delivery if room[endpoint.id] > 0 else add_refused_delivery
            add(session, endpoint.id, message_type, body, job_id=job.id, now=now)
            room[endpoint.id] -= 1
    # Not by way of the rows that were read: those of a job that is deleted meanwhile are gone.
    keys = [(event.job_id, event.seq) for event, _ in events]
    session.execute(
        sa.update(JobEvent).where(sa.tuple_(JobEvent.job_id, JobEvent.seq).in_(keys)).values(in_outbox=False),
        execution_options={"synchronize_session": False},
    )
    session.flush()
    return len(events)


def _interested(
    endpoints: Iterable[WebhookEndpoint], job: Job, message_type: WebhookEventType
) -> Iterable[WebhookEndpoint]:
    for endpoint in endpoints:
        hears = endpoint.events is None or message_type in endpoint.events
        if hears and endpoint.project == job.project and endpoint.labels.items() <= job.labels.items():
            yield endpoint


def _is_alone(session: Session) -> bool:
    # SQLite has one writer anyway.
    if session.get_bind().dialect.name != "postgresql":
        return True
    return bool(session.scalars(sa.select(sa.func.pg_try_advisory_xact_lock(_OUTBOX_LOCK))).one())


def _lock(session: Session) -> None:
    if session.get_bind().dialect.name == "postgresql":
        session.execute(sa.select(sa.func.pg_advisory_xact_lock(_OUTBOX_LOCK)))
