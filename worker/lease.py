"""The lease of an attempt on its job: renewed by heartbeats, which also bring stop requests."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import TypeVar

from domain.db import DATABASE_UNAVAILABLE, Database
from domain.errors import LostLease
from domain.jobs import leases
from domain.jobs.leases import Claim
from domain.jobs.states import StopRequest

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Lease:
    """Renews the lease when it is due.

    While the database is away the attempt goes on, for as long as nobody else can have taken the job.
    """

    def __init__(
        self,
        database: Database,
        claim: Claim,
        *,
        seconds: float,
        every: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._claim = claim
        self._seconds = seconds
        self._every = every
        self._clock = clock
        self._renewed = self._tried = clock()
        self._stop_request: StopRequest | None = None

    def heartbeat_if_due(self) -> StopRequest | None:
        """Renew the lease when that is due, and return the stop request that the last renewal brought.

        Raises:
            LostLease: the job is no longer this attempt's, or may no longer be.
        """
        if self._clock() - self._tried >= self._every:
            self._beat()
        return self._stop_request

    def renew_while(self, work: Callable[[], Result]) -> Result:
        """Run something long, that does not touch the database, while the lease is kept.

        Raises:
            LostLease: once `work` has ended.
        """
        with ThreadPoolExecutor(1) as aside:
            future: Future[Result] = aside.submit(work)
            while not wait_for([future], timeout=min(self._every, 1.0)).done:
                self.heartbeat_if_due()
        return future.result()

    def _beat(self) -> None:
        # The moment before the renewal: the lease lasts at least from there.
        self._tried = self._clock()
        try:
            with self._database.transaction(write=True) as session:
                stop_request = leases.heartbeat(session, self._claim, self._seconds)
        except DATABASE_UNAVAILABLE as error:
            log.warning("the lease could not be renewed: %s", type(error).__name__)
            if self._clock() - self._renewed >= self._seconds:
                raise LostLease from error
            return
        self._renewed = self._tried
        self._stop_request = stop_request
