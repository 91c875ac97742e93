"""A receiver, a database of jobs, and dispatchers whose clock a test sets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.orm import Session

from domain.db import Database
from domain.webhooks.deliveries import AttemptResult, DueMessage
from domain.webhooks.models import WebhookDelivery, WebhookEndpoint
from domain.webhooks.repository import add_endpoint, get_endpoint
from tests.support.webhook_receiver import Receiver, running_receiver
from worker.webhooks.dispatcher import WebhookDispatcher
from worker.webhooks.sender import WebhookSender

PROJECT = "default"


@dataclass
class Clock:
    """A clock that a test sets. It stands still otherwise."""

    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __call__(self, _session: Session) -> datetime:
        return self.at

    def advance(self, **time: float) -> None:
        self.at += timedelta(**time)


@dataclass
class WebhookHarness:
    """Endpoints in a database, and dispatchers that deliver to them."""

    database: Database
    clock: Clock = field(default_factory=Clock)
    dispatchers: list[WebhookDispatcher] = field(default_factory=list)

    def dispatcher(
        self, send: Callable[[DueMessage], AttemptResult] | None = None, **options: Any
    ) -> WebhookDispatcher:
        sender = WebhookSender(frozenset({"127.0.0.1"}), user_agent="test")
        defaults: dict[str, Any] = {"threads": 4, "disable_after": timedelta(days=5), "jitter": lambda: 0.5}
        made = WebhookDispatcher(self.database, send or sender.send, now=self.clock, **{**defaults, **options})
        self.dispatchers.append(made)
        return made

    def add(self, url: str, **columns: Any) -> WebhookEndpoint:
        fields: dict[str, Any] = {"description": "", "events": None, "labels": {}, **columns}
        with self.database.transaction(write=True) as session:
            return add_endpoint(session, project=PROJECT, url=url, **fields)

    def endpoint(self, webhook_id: str) -> WebhookEndpoint:
        with self.database.transaction(write=False) as session:
            return get_endpoint(session, PROJECT, webhook_id)

    def deliveries(self) -> list[WebhookDelivery]:
        """All deliveries, oldest first."""
        with self.database.transaction(write=False) as session:
            return list(session.query(WebhookDelivery).order_by(WebhookDelivery.created_at, WebhookDelivery.id))


def deliver(dispatcher: WebhookDispatcher) -> None:
    """Look once, and wait until all that began with that has ended."""
    for turn in dispatcher.look():
        turn.result()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running_receiver() as receiver:
        yield receiver


@pytest.fixture
def webhooks(database: Database) -> Iterator[WebhookHarness]:
    harness = WebhookHarness(database)
    yield harness
    for dispatcher in harness.dispatchers:
        dispatcher.close()
