"""Which of several schedulers leads: it alone does what is due, and the others wait to take its place.

The leader renews a lease in the database. One that dies or stands still is replaced once the lease has expired. Each of
its writing transactions begins by asking whether it still leads, by the row that another one has taken: a leader that
goes on after it was replaced, in the middle of a duty, writes nothing more.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import structlog
from sqlalchemy.orm import Session

from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.workers.repository import LEADER, duty_holder, release_duty, take_duty

_RENEWALS: Final = 3
"""Renewals within the time of a lease."""
_MAX_TURN_SECONDS: Final = 600.0
"""A loop that has not turned for so long is stuck in a duty: another scheduler had better lead."""

_log = structlog.get_logger(__name__)


class LeadershipLost(Exception):
    """Another scheduler leads now: nothing more may be written."""


class LeaderDatabase(Database):
    """A database whose writing transactions fail once another scheduler leads.

    Args:
        scheduler: the name of the scheduler whose transactions they are.
    """

    def __init__(self, url: str, scheduler: str) -> None:
        super().__init__(url)
        self._scheduler = scheduler

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Session]:
        """See :meth:`domain.db.Database.transaction`.

        Raises:
            LeadershipLost: the transaction writes, and another scheduler leads.
        """
        with super().transaction(write=write) as session:
            if write and duty_holder(session, LEADER) != self._scheduler:
                raise LeadershipLost
            yield session


class Leadership:
    """Whether the scheduler of this process leads, by a lease that a thread renews while the scheduler's loop turns.

    Args:
        database: for the lease alone.
        duties_database: for what the leader does.
        scheduler: the name of the scheduler, unique among them.
        lease_seconds: how long a leader that is silent stays one.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        database: Database,
        duties_database: LeaderDatabase,
        scheduler: str,
        lease_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.duties_database = duties_database
        self._database = database
        self._scheduler = scheduler
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._leads_until = self._aside_until = self._turned_at = clock()
        self._stopping = threading.Event()

    def leads(self) -> bool:
        """Whether this scheduler leads now. The scheduler's loop asks at each turn, which shows that it turns."""
        self._turned_at = self._clock()
        return self._turned_at < self._leads_until

    @property
    def is_leader(self) -> bool:
        """Whether this scheduler leads now, for others than its loop."""
        return self._clock() < self._leads_until

    def renew(self) -> None:
        """Take the lease where it is free, or renew it."""
        now = self._clock()
        led = now < self._leads_until
        if now - self._turned_at > _MAX_TURN_SECONDS or now < self._aside_until:
            return
        try:
            with self._database.transaction(write=True) as session:
                is_taken = take_duty(session, LEADER, self._scheduler, seconds=self._lease_seconds)
        except DatabaseUnavailable as error:
            _log.warning("database_unavailable", error=str(error))
            return
        # Counted from before the transaction: the lease of the row ends later than what is believed here.
        self._leads_until = now + self._lease_seconds if is_taken else now
        if is_taken != led:
            _log.info("leadership_taken" if is_taken else "leadership_lost", scheduler=self._scheduler)

    def step_aside(self) -> None:
        """Leave the lease to another scheduler, and take it no more before that one had time to."""
        self._aside_until = self._clock() + 2 * self._lease_seconds
        self._release()

    @contextmanager
    def renewing(self) -> Iterator[None]:
        """Renew as long as the block lasts, and give the lease back at its end."""
        self.renew()
        thread = threading.Thread(target=self._run, name="leadership", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()
            self._release()

    def _run(self) -> None:
        while not self._stopping.wait(self._lease_seconds / _RENEWALS):
            self.renew()

    def _release(self) -> None:
        self._leads_until = self._clock()
        with suppress(DatabaseUnavailable), self._database.transaction(write=True) as session:
            release_duty(session, LEADER, self._scheduler)
