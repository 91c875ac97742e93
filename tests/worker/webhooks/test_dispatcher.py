"""Deliveries to a real receiver: each message arrives at least once, in order, and nobody waits for a slow one."""

import threading
from datetime import timedelta

import pytest
import sqlalchemy as sa

from domain.jobs import actions
from domain.jobs.models import Job, JobEvent
from domain.jobs.states import CANCELLED, JobStatus
from domain.jobs.transitions import NewEvent, lock_job, record_events, transition
from domain.webhooks.deliveries import AttemptResult, DueMessage, add_test_delivery, redeliver
from domain.webhooks.outbox import write_messages_about
from domain.webhooks.repository import rotate_secret, update_endpoint
from tests.support.rows import add_job
from tests.support.waiting import eventually
from tests.support.webhook_receiver import Answer, Receiver, running_receiver
from tests.worker.webhooks.conftest import PROJECT, WebhookHarness, deliver


def start_job(webhooks: WebhookHarness, **columns: object) -> str:
    """A job that a worker has claimed: two events. Its id."""
    with webhooks.database.transaction(write=True) as session:
        job = add_job(session, **columns)
        job = record_events(
            session, job, [NewEvent("status", {"from": None, "to": "queued", "attempt": 0})], token=None
        )
        transition(session, job, JobStatus.PREPARING)
        return job.id


def cancel(webhooks: WebhookHarness, job_id: str) -> None:
    with webhooks.database.transaction(write=True) as session:
        job = lock_job(session, job_id)
        assert job is not None
        job = transition(session, job, JobStatus.CANCELLING)
        transition(session, job, JobStatus.CANCELLED, reason=CANCELLED)


def test_messages_arrive_signed_in_the_order_of_the_history(webhooks: WebhookHarness, receiver: Receiver) -> None:
    endpoint = webhooks.add(receiver.url)
    job = start_job(webhooks, name="news", labels={"team": "search"})
    cancel(webhooks, job)
    deliver(webhooks.dispatcher())
    messages = [request.verify(endpoint.secret) for request in receiver.requests]
    assert [message["type"] for message in messages] == ["job.queued", "job.started", "job.cancelled"]
    assert {message["data"]["job"]["id"] for message in messages} == {job}
    assert messages[0]["data"]["job"] == {"id": job, "name": "news", "project": PROJECT, "labels": {"team": "search"}}
    assert [message["data"]["sequence"] for message in messages] == [1, 2, 4]
    assert messages[2]["data"]["reason"]["code"] == "cancelled"
    assert len(set(receiver.ids)) == 3
    assert {delivery.status for delivery in webhooks.deliveries()} == {"delivered"}


def test_message_is_sent_again_under_its_id_by_the_next_process_after_a_kill(
    webhooks: WebhookHarness, receiver: Receiver
) -> None:
    endpoint = webhooks.add(receiver.url, events=["job.started"])
    start_job(webhooks)
    killed = webhooks.dispatcher()
    send = killed.send

    def send_and_die(message: DueMessage) -> AttemptResult:
        send(message)
        raise SystemExit

    killed.send = send_and_die
    with pytest.raises(SystemExit):
        deliver(killed)
    survivor = webhooks.dispatcher()
    deliver(survivor)
    # The lease of the killed process has not expired yet.
    assert len(receiver.requests) == 1
    webhooks.clock.advance(seconds=91)
    deliver(survivor)
    assert receiver.ids[0] == receiver.ids[1]
    first, second = (request.verify(endpoint.secret) for request in receiver.requests)
    assert first == second
    webhooks.clock.advance(hours=2)
    deliver(survivor)
    assert len(receiver.requests) == 2


def test_processes_that_deliver_at_once_send_each_message_once(webhooks: WebhookHarness, receiver: Receiver) -> None:
    for _ in range(3):
        webhooks.add(receiver.url)
    for _ in range(4):
        start_job(webhooks)
    dispatchers = [webhooks.dispatcher(threads=2) for _ in range(3)]

    def work(dispatcher: object) -> None:
        for _ in range(4):
            deliver(dispatcher)  # type: ignore[arg-type] # A dispatcher, which the thread gets as an object.

    threads = [threading.Thread(target=work, args=(dispatcher,)) for dispatcher in dispatchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(receiver.ids) == len(set(receiver.ids)) == 24


def test_slow_endpoint_delays_no_other(webhooks: WebhookHarness, receiver: Receiver) -> None:
    with running_receiver() as slow:
        released = threading.Event()
        slow.answers = [Answer(after=released)]
        webhooks.add(slow.url)
        fast = webhooks.add(receiver.url)
        start_job(webhooks)
        dispatcher = webhooks.dispatcher(threads=2)
        turns = dispatcher.look()
        try:
            eventually(lambda: len(receiver.requests) == 2 and webhooks.endpoint(fast.id).lease_expires_at is None)
            start_job(webhooks)
            turns += dispatcher.look()
            eventually(lambda: len(receiver.requests) == 4)
            assert len(slow.requests) == 1
        finally:
            released.set()
            for turn in turns:
                turn.result()


def test_failing_endpoints_never_have_all_threads(webhooks: WebhookHarness, receiver: Receiver) -> None:
    released = threading.Event()
    with running_receiver() as failing:
        for _ in range(4):
            endpoint = webhooks.add(failing.url)
            with webhooks.database.transaction(write=True) as session:
                update_endpoint(session, PROJECT, endpoint.id, {"failures": 3})
        failing.answers = [Answer(after=released) for _ in range(4)]
        start_job(webhooks)
        dispatcher = webhooks.dispatcher(threads=4)
        turns = dispatcher.look()
        try:
            eventually(lambda: len(failing.requests) == 2)
            webhooks.add(receiver.url)
            start_job(webhooks)
            turns += dispatcher.look()
            eventually(lambda: len(receiver.requests) == 2)
            assert len(failing.requests) == 2
        finally:
            released.set()
            for turn in turns:
                turn.result()


def test_failed_message_is_tried_later_and_later_for_a_day(webhooks: WebhookHarness, receiver: Receiver) -> None:
    webhooks.add(receiver.url, events=["job.started"])
    start_job(webhooks)
    dispatcher = webhooks.dispatcher()
    receiver.answers = [Answer(500) for _ in range(100)]
    began, waits = webhooks.clock.at, []
    while True:
        deliver(dispatcher)
        (delivery,) = webhooks.deliveries()
        if delivery.next_attempt_at is None:
            break
        waits.append((delivery.next_attempt_at - webhooks.clock.at).total_seconds())
        # A moment before, nothing is sent.
        webhooks.clock.at = delivery.next_attempt_at - timedelta(seconds=1)
        deliver(dispatcher)
        webhooks.clock.at = delivery.next_attempt_at
    assert waits[:4] == [5, 20, 80, 320]
    assert waits == sorted(waits)
    assert len(receiver.requests) == len(waits) + 1 == delivery.attempt_count
    assert timedelta(hours=18) < webhooks.clock.at - began <= timedelta(hours=24)
    assert (delivery.status, delivery.failure) == ("failed", "attempts_exhausted")
    assert {attempt["status_code"] for attempt in delivery.attempts} == {500}
    assert len(set(receiver.ids)) == 1


def test_receiver_is_left_alone_for_as_long_as_it_asks(webhooks: WebhookHarness, receiver: Receiver) -> None:
    webhooks.add(receiver.url)
    start_job(webhooks)
    dispatcher = webhooks.dispatcher()
    receiver.answers = [Answer(503, {"retry-after": "600"})]
    deliver(dispatcher)
    webhooks.clock.advance(seconds=599)
    deliver(dispatcher)
    assert len(receiver.requests) == 1
    webhooks.clock.advance(seconds=1)
    deliver(dispatcher)
    assert receiver.types == ["job.queued", "job.queued", "job.started"]


def test_endpoint_that_is_gone_is_disabled_and_gets_nothing_more(webhooks: WebhookHarness, receiver: Receiver) -> None:
    endpoint = webhooks.add(receiver.url)
    start_job(webhooks)
    receiver.answers = [Answer(410)]
    dispatcher = webhooks.dispatcher()
    deliver(dispatcher)
    disabled = webhooks.endpoint(endpoint.id)
    assert (disabled.status, disabled.disabled_reason) == ("disabled", "gone")
    webhooks.clock.advance(hours=1)
    start_job(webhooks)
    deliver(dispatcher)
    assert len(receiver.requests) == 1
    webhooks.clock.advance(hours=24)
    dispatcher.collect_garbage(older_than=timedelta(days=30), kept=100)
    assert [delivery.failure for delivery in webhooks.deliveries()] == ["expired", "expired"]


def test_endpoint_that_fails_for_days_is_disabled_with_the_reason(webhooks: WebhookHarness, receiver: Receiver) -> None:
    endpoint = webhooks.add(receiver.url, events=["job.started"])
    receiver.answers = [Answer(500) for _ in range(1000)]
    dispatcher = webhooks.dispatcher(disable_after=timedelta(days=5))
    for _ in range(6):
        start_job(webhooks)
        deliver(dispatcher)
        assert webhooks.endpoint(endpoint.id).status == "enabled"
        webhooks.clock.advance(hours=23)
    # Long after the last failure the days are counted anew.
    webhooks.clock.advance(days=10)
    start_job(webhooks)
    deliver(dispatcher)
    assert webhooks.endpoint(endpoint.id).status == "enabled"
    for _ in range(6):
        webhooks.clock.advance(hours=23)
        start_job(webhooks)
        deliver(dispatcher)
    disabled = webhooks.endpoint(endpoint.id)
    assert (disabled.status, disabled.disabled_reason) == ("disabled", "failing")
    with webhooks.database.transaction(write=True) as session:
        enabled = update_endpoint(session, PROJECT, endpoint.id, {"status": "enabled"})
    assert (enabled.status, enabled.disabled_reason, enabled.failures) == ("enabled", None, 0)


def test_both_secrets_are_valid_for_the_time_of_grace(webhooks: WebhookHarness, receiver: Receiver) -> None:
    endpoint = webhooks.add(receiver.url)
    dispatcher = webhooks.dispatcher()

    def send_test() -> list[str]:
        with webhooks.database.transaction(write=True) as session:
            add_test_delivery(session, PROJECT, endpoint.id, now=webhooks.clock.at)
        deliver(dispatcher)
        return receiver.requests[-1].headers["webhook-signature"].split()

    assert len(send_test()) == 1
    with webhooks.database.transaction(write=True) as session:
        rotated = rotate_secret(session, PROJECT, endpoint.id, grace_seconds=3600)
    assert rotated.secret != endpoint.secret
    assert len(send_test()) == 2
    for secret in (endpoint.secret, rotated.secret):
        assert receiver.requests[-1].verify(secret)["type"] == "webhook.test"
    webhooks.clock.advance(seconds=3601)
    assert len(send_test()) == 1
    receiver.requests[-1].verify(rotated.secret)


def test_message_is_delivered_again_on_request_under_its_id(webhooks: WebhookHarness, receiver: Receiver) -> None:
    endpoint = webhooks.add(receiver.url, events=["job.started"])
    start_job(webhooks)
    dispatcher = webhooks.dispatcher()
    deliver(dispatcher)
    (delivery,) = webhooks.deliveries()
    webhooks.clock.advance(days=3)
    with webhooks.database.transaction(write=True) as session:
        redeliver(session, PROJECT, endpoint.id, delivery.id, now=webhooks.clock.at)
    deliver(dispatcher)
    assert receiver.ids == [delivery.id] * 2
    (delivery,) = webhooks.deliveries()
    assert (delivery.status, [attempt["number"] for attempt in delivery.attempts]) == ("delivered", [1, 2])


def test_process_without_the_lease_writes_nothing(webhooks: WebhookHarness, receiver: Receiver) -> None:
    webhooks.add(receiver.url, events=["job.started"])
    start_job(webhooks)
    slow = webhooks.dispatcher()
    send = slow.send

    def send_late(message: DueMessage) -> AttemptResult:
        result = send(message)
        webhooks.clock.advance(seconds=91)
        receiver.answers = [Answer(500)]
        deliver(webhooks.dispatcher())
        return result

    slow.send = send_late
    deliver(slow)
    (delivery,) = webhooks.deliveries()
    # What the holder of the newer lease saw counts.
    assert (delivery.status, delivery.attempt_count) == ("pending", 1)


def test_deleted_job_has_told_of_its_end(webhooks: WebhookHarness, receiver: Receiver) -> None:
    webhooks.add(receiver.url)
    job = start_job(webhooks)
    cancel(webhooks, job)
    with webhooks.database.transaction(write=True) as session:
        write_messages_about(session, job)
        actions.delete_job(session, PROJECT, job)
    with webhooks.database.transaction(write=False) as session:
        assert session.scalars(sa.select(JobEvent).where(JobEvent.job_id == job)).all() == []
        assert session.get(Job, job) is None
    webhooks.clock.advance(minutes=1)
    deliver(webhooks.dispatcher())
    assert receiver.types == ["job.queued", "job.started", "job.cancelled"]
