"""Webhooks of a running service: real schedulers deliver, and one that is killed in between loses nothing."""

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from domain.db import db_now
from domain.webhooks.models import WebhookDelivery, WebhookEndpoint
from domain.webhooks.repository import add_endpoint
from tests.support.harness import PROJECT, ServiceHarness, kill
from tests.support.processes import Processes
from tests.support.waiting import eventually
from tests.support.webhook_receiver import Answer, running_receiver


@pytest.mark.slow
@pytest.mark.system
def test_message_of_a_scheduler_that_was_killed_while_it_sent_is_sent_again_by_another(
    processes: Processes, redis_url: str, tmp_path: Path, database_url: str
) -> None:
    harness = ServiceHarness(tmp_path / "home", database_url, redis_url=redis_url)
    environment = {**harness.environment(), "POCL_WEBHOOK_INTERNAL_HOSTS": "127.0.0.1"}
    unanswered = threading.Event()
    with running_receiver() as receiver:
        receiver.answers = [Answer(after=unanswered)]
        with harness.database.transaction(write=True) as session:
            endpoint = add_endpoint(
                session, project=PROJECT, url=receiver.url, description="", events=["job.queued"], labels={}
            )
        job = harness.submit()
        first = processes.start("scheduler", environment)
        eventually(lambda: receiver.requests, within=60, what="the first scheduler sends the message")
        kill(first.pid)
        unanswered.set()
        with harness.database.transaction(write=True) as session:
            # In place of a minute and a half.
            session.execute(sa.update(WebhookEndpoint).values(lease_expires_at=db_now(-1)))
        second = processes.start("scheduler", environment)
        eventually(lambda: len(receiver.requests) == 2, within=60, what="another scheduler sends it again")
        messages = [request.verify(endpoint.secret) for request in receiver.requests]
        assert messages[0] == messages[1]
        assert messages[0]["data"]["job"]["id"] == job
        assert len(set(receiver.ids)) == 1

        def delivered() -> bool:
            with harness.database.transaction(write=False) as session:
                return session.scalars(sa.select(WebhookDelivery.status)).all() == ["delivered"]

        eventually(delivered, what="the delivery is written down")
        assert endpoint.secret not in second.log
        assert receiver.url not in second.log
    harness.close()
