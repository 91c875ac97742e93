"""Rows of deliveries: whose turn it is, and how long they are kept."""

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import Database
from domain.webhooks.deliveries import (
    LIFETIME,
    AttemptResult,
    BacklogFull,
    add_delivery,
    add_test_delivery,
    claim_endpoint,
    delete_old,
    give_up_expired,
    record_attempt,
    redeliver,
    wait_seconds,
)
from domain.webhooks.models import WebhookDelivery
from domain.webhooks.repository import add_endpoint

NOW = datetime(2026, 11, 27, tzinfo=UTC)
OK = AttemptResult(None, 0.1, 204)


def add_endpoints(session: Session, count: int) -> list[str]:
    return [
        add_endpoint(
            session,
            project="default",
            url=f"https://hooks{number}.example/",
            description="",
            events=None,
            labels={},
        ).id
        for number in range(count)
    ]


def add_messages(session: Session, endpoint_id: str, count: int, *, now: datetime = NOW) -> list[str]:
    messages = [add_delivery(session, endpoint_id, "job.queued", "{}", job_id=None, now=now) for _ in range(count)]
    session.flush()
    return [message.id for message in messages]


def settle_next(session: Session, now: datetime) -> tuple[str, str] | None:
    """Deliver the next message in a turn of its own; its endpoint and its id."""
    claimed = claim_endpoint(session, now=now)
    if claimed is None:
        return None
    lease, message = claimed
    record_attempt(session, lease, message.id, OK, now=now, jitter=0, disable_after=timedelta(days=5), ends=True)
    return lease.endpoint_id, message.id


def test_endpoints_take_turns_and_each_gets_its_messages_in_order(database: Database) -> None:
    with database.transaction(write=True) as session:
        endpoints = add_endpoints(session, 3)
        messages = {endpoint: add_messages(session, endpoint, 3) for endpoint in endpoints}
        turns = [settle_next(session, NOW + timedelta(seconds=n)) for n in range(9)]
        assert settle_next(session, NOW + timedelta(seconds=9)) is None
    assert [turn[0] for turn in turns if turn] == endpoints * 3
    for endpoint in endpoints:
        assert [turn[1] for turn in turns if turn and turn[0] == endpoint] == messages[endpoint]


def test_leased_endpoint_is_nobody_elses_until_the_lease_expires(database: Database) -> None:
    with database.transaction(write=True) as session:
        (endpoint,) = add_endpoints(session, 1)
        add_messages(session, endpoint, 2)
        first = claim_endpoint(session, now=NOW)
        assert first is not None
        assert claim_endpoint(session, now=NOW + timedelta(seconds=89)) is None
        second = claim_endpoint(session, now=NOW + timedelta(seconds=91))
        assert second is not None
        assert (second[1].id, second[0].token) == (first[1].id, first[0].token + 1)


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
def test_waits_grow_by_a_factor_and_are_bounded(jitter: float) -> None:
    plain = [5, 20, 80, 320, 1280, 5120, 14400, 14400]
    factor = 0.75 + jitter / 2
    assert [wait_seconds(n, jitter) for n in range(1, 9)] == [pytest.approx(factor * seconds) for seconds in plain]
    assert wait_seconds(10**6, jitter) <= 1.25 * 14400


def test_old_rows_are_deleted_by_age_and_by_number_and_waiting_ones_stay(database: Database) -> None:
    with database.transaction(write=True) as session:
        many, few = add_endpoints(session, 2)
        delivered = add_messages(session, many, 6) + add_messages(session, few, 1)
        while settle_next(session, NOW):
            pass
        waiting = add_messages(session, many, 2, now=NOW + timedelta(days=40))
        assert delete_old(session, now=NOW + timedelta(days=29), older_than=timedelta(days=30), kept=4) == 2
        kept = set(session.scalars(sa.select(WebhookDelivery.id)))
        assert kept == {*delivered[2:], *waiting}
        assert delete_old(session, now=NOW + timedelta(days=31), older_than=timedelta(days=30), kept=4) == 5
        assert set(session.scalars(sa.select(WebhookDelivery.id))) == set(waiting)


def test_tests_and_redeliveries_find_room_in_the_backlog_or_are_refused(database: Database) -> None:
    with database.transaction(write=True) as session:
        (endpoint,) = add_endpoints(session, 1)
        delivered, waiting = add_messages(session, endpoint, 2)
        assert settle_next(session, NOW) == (endpoint, delivered)
        add_test_delivery(session, "default", endpoint, now=NOW, max_pending=2)
        with pytest.raises(BacklogFull):
            add_test_delivery(session, "default", endpoint, now=NOW, max_pending=2)
        with pytest.raises(BacklogFull):
            redeliver(session, "default", endpoint, delivered, now=NOW, max_pending=2)
        # One that waits already takes no more room when it is hurried.
        assert redeliver(session, "default", endpoint, waiting, now=NOW, max_pending=2).status == "pending"


def test_message_that_nobody_could_deliver_in_time_is_given_up(database: Database) -> None:
    with database.transaction(write=True) as session:
        (endpoint,) = add_endpoints(session, 1)
        add_messages(session, endpoint, 2)
        assert give_up_expired(session, now=NOW + LIFETIME - timedelta(seconds=1)) == 0
        assert give_up_expired(session, now=NOW + LIFETIME, limit=1) == 1
        assert give_up_expired(session, now=NOW + LIFETIME) == 1
        assert claim_endpoint(session, now=NOW + LIFETIME) is None
        rows = session.scalars(sa.select(WebhookDelivery)).all()
        assert {(row.status, row.failure, row.next_attempt_at) for row in rows} == {("failed", "expired", None)}
