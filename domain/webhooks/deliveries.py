"""Delivery of messages: which is due, what came of an attempt, when the next one is, and how long rows are kept.

An endpoint is delivered to by one process at a time, which holds a lease on it: so no two ever send the same message at
once, messages about a job arrive in the order of its history as long as attempts succeed, and one slow endpoint takes
one of the places that there are. A process that is killed after it sent a message and before it wrote that down leaves
the message due: the next holder of the lease sends it again, under the same id.

Every function takes the time from its caller, who has it from the database. None commits.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import KeysetPage, fetch_page
from domain.errors import Conflict, LostLease, NotFound, QuotaExceeded
from domain.ids import new_id
from domain.webhooks.event_types import TEST_TYPE, write_test_message
from domain.webhooks.models import DeliveryError, DeliveryStatus, WebhookDelivery, WebhookEndpoint
from domain.webhooks.repository import disable, lock_endpoint

LEASE_SECONDS: Final = 90
"""How long a lease on an endpoint lasts: longer than an attempt may take in all."""
LIFETIME: Final = timedelta(hours=24)
"""How long a message is tried."""
MAX_ATTEMPTS_KEPT: Final = 20
"""How many of its attempts a message's row has."""
MAX_PENDING: Final = 10_000
"""How many messages wait for one endpoint at most."""
_FIRST_WAIT_SECONDS: Final = 5
_WAIT_FACTOR: Final = 4
_MAX_WAIT_SECONDS: Final = 4 * 3600
_UNINTERRUPTED: Final = timedelta(hours=48)
"""Failures that are further apart than this do not count as one time of failing."""
_RECEIVER_IS_BUSY: Final = (429, 502, 503, 504)


class DeliveryNotFound(NotFound):
    """The webhook has no delivery of this id."""

    code = "delivery_not_found"


class WebhookIsDisabled(Conflict):
    """Nothing is delivered to a disabled webhook: enable it first."""

    code = "webhook_is_disabled"


class BacklogFull(QuotaExceeded):
    """As many messages wait for the webhook as may: wait until some have been delivered."""

    code = "backlog_full"


@dataclass(frozen=True)
class AttemptResult:
    """What came of sending a message once."""

    error: DeliveryError | None
    """Why it failed; null for success."""
    seconds: float
    """How long it took."""
    status_code: int | None = None
    """The status of the response; null where there was none."""
    retry_after: float | None = None
    """Seconds for which the receiver asked to be left alone."""
    detail: str = ""
    """One sentence about the error, without the URL."""


@dataclass(frozen=True)
class EndpointLease:
    """The right to deliver to an endpoint."""

    endpoint_id: str
    token: int
    failing: bool
    """Whether the last attempt at the endpoint failed."""


@dataclass(frozen=True)
class DueMessage:
    """A message that is to be sent now, with all that sending it needs."""

    id: str
    type: str
    body: str
    url: str
    secrets: tuple[str, ...]
    """The secrets to sign it with, the newest first."""


def add_delivery(
    session: Session, endpoint_id: str, message_type: str, body: str, *, job_id: str | None, now: datetime
) -> WebhookDelivery:
    """Add a message that is due at once."""
    delivery = WebhookDelivery(
        id=new_id("msg"),
        endpoint_id=endpoint_id,
        type=message_type,
        job_id=job_id,
        body=body,
        created_at=now,
        next_attempt_at=now,
        expires_at=now + LIFETIME,
    )
    session.add(delivery)
    return delivery


def add_refused_delivery(
    session: Session, endpoint_id: str, message_type: str, body: str, *, job_id: str | None, now: datetime
) -> WebhookDelivery:
    """Add a message that is not delivered, since too many others wait: it stands in the log, for :func:`redeliver`."""
    delivery = add_delivery(session, endpoint_id, message_type, body, job_id=job_id, now=now)
    delivery.status, delivery.failure, delivery.settled_at = "failed", "backlog_full", now
    delivery.next_attempt_at = None
    return delivery


def count_pending(session: Session, endpoint_id: str) -> int:
    """How many messages wait for an endpoint."""
    statement = sa.select(sa.func.count()).where(
        WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.next_attempt_at.is_not(None)
    )
    return session.scalars(statement).one()


def add_test_delivery(
    session: Session, project: str, webhook_id: str, *, now: datetime, max_pending: int = MAX_PENDING
) -> WebhookDelivery:
    """Add a test message to an endpoint.

    Args:
        max_pending: how many messages may wait for the endpoint.

    Raises:
        WebhookNotFound: the project has no such endpoint.
        WebhookIsDisabled: nothing is delivered to it.
        BacklogFull: as many messages wait for it as may.
    """
    endpoint = lock_endpoint(session, project, webhook_id)
    _require_enabled(endpoint)
    _require_room(session, endpoint, max_pending)
    delivery = add_delivery(session, endpoint.id, TEST_TYPE, write_test_message(endpoint.id, now), job_id=None, now=now)
    session.flush()
    return delivery


def list_deliveries(
    session: Session,
    endpoint: WebhookEndpoint,
    *,
    limit: int,
    after: str | None = None,
    status: DeliveryStatus | None = None,
) -> KeysetPage[WebhookDelivery]:
    """The messages to an endpoint, newest first, after the one with the id `after`."""
    statement = sa.select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint.id)
    if status is not None:
        statement = statement.where(WebhookDelivery.status == status)
    if after is not None:
        statement = statement.where(WebhookDelivery.id < after)
    return fetch_page(session, statement.order_by(WebhookDelivery.id.desc()), limit=limit)


def get_delivery(session: Session, endpoint: WebhookEndpoint, delivery_id: str) -> WebhookDelivery:
    """A message to an endpoint.

    Raises:
        DeliveryNotFound: the endpoint has no such message.
    """
    statement = sa.select(WebhookDelivery).where(
        WebhookDelivery.id == delivery_id, WebhookDelivery.endpoint_id == endpoint.id
    )
    delivery = session.scalars(statement).one_or_none()
    if delivery is None:
        raise DeliveryNotFound
    return delivery


def redeliver(
    session: Session, project: str, webhook_id: str, delivery_id: str, *, now: datetime, max_pending: int = MAX_PENDING
) -> WebhookDelivery:
    """Have a message delivered again, under its id, at once and for as long as a new one.

    Args:
        max_pending: how many messages may wait for the endpoint.

    Raises:
        WebhookNotFound, DeliveryNotFound: there is no such endpoint or message.
        WebhookIsDisabled: nothing is delivered to the endpoint.
        BacklogFull: the message does not wait already, and as many others do as may.
    """
    # Whoever delivers holds this row lock while the outcome of an attempt is written.
    endpoint = lock_endpoint(session, project, webhook_id)
    _require_enabled(endpoint)
    delivery = get_delivery(session, endpoint, delivery_id)
    if delivery.next_attempt_at is None:
        _require_room(session, endpoint, max_pending)
    delivery.status, delivery.failure, delivery.settled_at, delivery.retries = "pending", None, None, 0
    delivery.next_attempt_at, delivery.expires_at = now, now + LIFETIME
    session.flush()
    return delivery


# --- Leases ---------------------------------------------------------------------------------------------


def has_due(session: Session, *, now: datetime, healthy_only: bool = False) -> bool:
    """Whether :func:`claim_endpoint` would find anything."""
    statement = _endpoints_with_due_messages(now, healthy_only=healthy_only).limit(1)
    return session.scalars(statement).one_or_none() is not None


def claim_endpoint(
    session: Session, *, now: datetime, healthy_only: bool = False
) -> tuple[EndpointLease, DueMessage] | None:
    """Lease the endpoint with a due message that was served the longest ago, and its first message; null for none.

    Args:
        healthy_only: pass over endpoints whose last attempt failed.
    """
    endpoint = session.scalars(
        _endpoints_with_due_messages(now, healthy_only=healthy_only)
        .order_by(WebhookEndpoint.served_at.asc().nulls_first(), WebhookEndpoint.id)
        .limit(1)
        .with_for_update(skip_locked=True),
        execution_options={"populate_existing": True},
    ).one_or_none()
    if endpoint is None:
        return None
    endpoint.lease_token += 1
    endpoint.served_at = now
    lease = EndpointLease(endpoint.id, endpoint.lease_token, failing=endpoint.failures > 0)
    message = _next_message(session, endpoint, now)
    session.flush()
    return None if message is None else (lease, message)


def record_attempt(
    session: Session,
    lease: EndpointLease,
    message_id: str,
    result: AttemptResult,
    *,
    now: datetime,
    jitter: float,
    disable_after: timedelta,
    ends: bool = False,
) -> DueMessage | None:
    """Write down what came of an attempt, and go on to the next message; null where the lease has ended.

    It ends after a failure, so that each endpoint has its turn.

    Args:
        now: the time after the attempt.
        jitter: 0 to 1, at random: the wait is 75 to 125 % of its length by that.
        disable_after: how long an endpoint may fail before it is disabled.
        ends: end the lease whatever came of the attempt.

    Raises:
        LostLease: another process delivers to the endpoint by now, or it was deleted; nothing is written.
    """
    endpoint = _lock_leased(session, lease)
    delivery = session.get(WebhookDelivery, message_id, populate_existing=True)
    if delivery is not None:
        _record(delivery, result, now, jitter)
    _count(endpoint, result, now, disable_after)
    message = None if ends or result.error is not None else _next_message(session, endpoint, now)
    if message is None:
        endpoint.lease_expires_at = None
    session.flush()
    return message


def wait_seconds(failures: int, jitter: float) -> float:
    """How long to wait after so many failed attempts in a row, at least one: exponentially more each time, with jitter.

    Args:
        jitter: 0 to 1, at random.
    """
    # The exponent is bounded, for a float overflows.
    seconds = min(_FIRST_WAIT_SECONDS * _WAIT_FACTOR ** min(failures - 1, 20), _MAX_WAIT_SECONDS)
    return float(seconds * (0.75 + 0.5 * jitter))


def _endpoints_with_due_messages(now: datetime, *, healthy_only: bool) -> sa.Select[WebhookEndpoint]:
    return sa.select(WebhookEndpoint).where(
        WebhookEndpoint.status == "enabled",
        sa.or_(WebhookEndpoint.lease_expires_at.is_(None), WebhookEndpoint.lease_expires_at <= now),
        sa.or_(WebhookEndpoint.not_before.is_(None), WebhookEndpoint.not_before <= now),
        WebhookEndpoint.failures == 0 if healthy_only else sa.true(),
        sa.exists().where(
            WebhookDelivery.endpoint_id == WebhookEndpoint.id,
            WebhookDelivery.next_attempt_at <= now,
            WebhookDelivery.expires_at > now,
        ),
    )


def _lock_leased(session: Session, lease: EndpointLease) -> WebhookEndpoint:
    endpoint = session.scalars(
        sa.select(WebhookEndpoint)
        .where(WebhookEndpoint.id == lease.endpoint_id, WebhookEndpoint.lease_token == lease.token)
        .with_for_update(),
        execution_options={"populate_existing": True},
    ).one_or_none()
    if endpoint is None:
        raise LostLease
    return endpoint


def _next_message(session: Session, endpoint: WebhookEndpoint, now: datetime) -> DueMessage | None:
    """The first due message, under a lease that begins anew; null where there is none."""
    if endpoint.status != "enabled":
        return None
    delivery = session.scalars(
        sa.select(WebhookDelivery)
        .where(
            WebhookDelivery.endpoint_id == endpoint.id,
            WebhookDelivery.next_attempt_at <= now,
            WebhookDelivery.expires_at > now,
        )
        .order_by(WebhookDelivery.created_at, WebhookDelivery.id)
        .limit(1),
        execution_options={"populate_existing": True},
    ).one_or_none()
    if delivery is None:
        return None
    endpoint.lease_expires_at = now + timedelta(seconds=LEASE_SECONDS)
    secrets = [endpoint.secret]
    if endpoint.former_secret is not None and (endpoint.former_secret_until or now) > now:
        secrets.append(endpoint.former_secret)
    return DueMessage(delivery.id, delivery.type, delivery.body, endpoint.url, tuple(secrets))


def _record(delivery: WebhookDelivery, result: AttemptResult, now: datetime, jitter: float) -> None:
    attempt: dict[str, Any] = {
        "number": delivery.attempt_count + 1,
        "at": (now - timedelta(seconds=result.seconds)).isoformat(),
        "seconds": round(result.seconds, 3),
        "status_code": result.status_code,
        "error": result.error,
        "detail": result.detail,
    }
    delivery.attempt_count += 1
    delivery.attempts = [*delivery.attempts, attempt][-MAX_ATTEMPTS_KEPT:]
    if result.error is None:
        delivery.status, delivery.next_attempt_at, delivery.settled_at = "delivered", None, now
        return
    delivery.retries += 1
    wait = max(wait_seconds(delivery.retries, jitter), result.retry_after or 0)
    next_attempt_at = now + timedelta(seconds=wait)
    if next_attempt_at >= delivery.expires_at:
        delivery.status, delivery.failure = "failed", "attempts_exhausted"
        delivery.next_attempt_at, delivery.settled_at = None, now
    else:
        delivery.next_attempt_at = next_attempt_at


def _count(endpoint: WebhookEndpoint, result: AttemptResult, now: datetime, disable_after: timedelta) -> None:
    if result.error is None:
        endpoint.failures, endpoint.failing_since, endpoint.delivered_at = 0, None, now
        endpoint.not_before = None
        return
    if endpoint.failing_since is None or endpoint.failed_at is None or now - endpoint.failed_at > _UNINTERRUPTED:
        endpoint.failing_since = now
    endpoint.failures += 1
    endpoint.failed_at = now
    if result.retry_after and result.status_code in _RECEIVER_IS_BUSY:
        # It is the receiver that is busy, not this one message that is too much for it.
        endpoint.not_before = now + min(timedelta(seconds=result.retry_after), LIFETIME)
    if result.error == "gone":
        disable(endpoint, "gone", now)
    elif now - endpoint.failing_since >= disable_after:
        disable(endpoint, "failing", now)


def _require_enabled(endpoint: WebhookEndpoint) -> None:
    if endpoint.status != "enabled":
        raise WebhookIsDisabled


def _require_room(session: Session, endpoint: WebhookEndpoint, max_pending: int) -> None:
    # The row of the endpoint is locked, so nobody adds a message meanwhile.
    if count_pending(session, endpoint.id) >= max_pending:
        raise BacklogFull


# --- Retention ------------------------------------------------------------------------------------------


def give_up_expired(session: Session, *, now: datetime, limit: int = 500) -> int:
    """Give up messages that were not delivered in time, as those to an endpoint that is disabled; their number."""
    expired = (
        sa.select(WebhookDelivery.id)
        .where(WebhookDelivery.status == "pending", WebhookDelivery.expires_at <= now)
        .limit(limit)
    )
    updated = session.execute(
        sa.update(WebhookDelivery)
        .where(WebhookDelivery.id.in_(expired.scalar_subquery()))
        .values(status="failed", failure="expired", next_attempt_at=None, settled_at=now)
        .returning(WebhookDelivery.id),
        execution_options={"synchronize_session": False},
    )
    return len(updated.all())


def delete_old(session: Session, *, now: datetime, older_than: timedelta, kept: int, limit: int = 1000) -> int:
    """Delete rows of messages that are delivered or given up; the number of rows.

    Args:
        older_than: rows that were settled longer ago go.
        kept: of each endpoint this many of the newest rows stay at most.
        limit: rows of one endpoint, and rows by age, that go at once.
    """
    settled = WebhookDelivery.status != "pending"
    old = sa.select(WebhookDelivery.id).where(settled, WebhookDelivery.settled_at < now - older_than).limit(limit)
    deleted = _delete(session, old)
    for endpoint_id in session.scalars(sa.select(WebhookEndpoint.id)).all():
        beyond = (
            sa.select(WebhookDelivery.id)
            .where(settled, WebhookDelivery.endpoint_id == endpoint_id)
            .order_by(WebhookDelivery.id.desc())
            .offset(kept)
            .limit(limit)
        )
        deleted += _delete(session, beyond)
    return deleted


def _delete(session: Session, ids: sa.Select[Any]) -> int:
    deleted = session.execute(
        sa.delete(WebhookDelivery).where(WebhookDelivery.id.in_(ids.scalar_subquery())).returning(WebhookDelivery.id),
        execution_options={"synchronize_session": False},
    )
    return len(deleted.all())
