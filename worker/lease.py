"""The lease of an attempt on its job: renewed by heartbeats, which also bring stop requests."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextvars import copy_context
from typing import TypeVar

import structlog

from domain.db import DATABASE_UNAVAILABLE, Database
from domain.errors import LostLease
from domain.jobs import leases
from domain.jobs.leases import Claim
from domain.jobs.states import StopRequest

_log = structlog.get_logger(__name__)

Result = TypeVar("Result")


class Lease:
    """Renews the lease when it is due.

    While the database is unavailable the attempt goes on, for as long as no other worker can have claimed the job.
    """

    def __init__(
        self,
        database: Database,
        claim: Claim,
        *,
        seconds: float,
        interval: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._claim = claim
        self._seconds = seconds
        self._interval = interval
        self._clock = clock
        self._renewed_at = self._tried_at = clock()
        self._stop_request: StopRequest | None = None

    def heartbeat_if_due(self) -> StopRequest | None:
        """Renew the lease when that is due, and return the stop request that the last renewal brought.

        Raises:
            LostLease: the job is no longer this attempt's, or may no longer be.
        """
        if self._clock() - self._tried_at >= self._interval:
            self._heartbeat()
        return self._stop_request

    def renew_while(self, work: Callable[[], Result]) -> Result:
        """Run `work`, which takes long and does not touch the database, and renew the lease meanwhile.

        Raises:
            LostLease: once `work` has ended.
        """
        with ThreadPoolExecutor(1) as executor:
            # In the caller's context, so that what `work` logs names the job too.
            future: Future[Result] = executor.submit(copy_context().run, work)
            while not wait_for([future], timeout=min(self._interval, 1.0)).done:
                self.heartbeat_if_due()
        return future.result()

    def _heartbeat(self) -> None:
        # Taken before the renewal: the lease lasts for at least `seconds` from this moment.
        self._tried_at = self._clock()
        try:
            with self._database.transaction(write=True) as session:
                stop_request = leases.heartbeat(session, self._claim, self._seconds)
        except DATABASE_UNAVAILABLE as error:
            _log.warning("lease_not_renewed", error=type(error).__name__)
            if self._clock() - self._renewed_at >= self._seconds:
                raise LostLease from error
            return
        self._renewed_at = self._tried_at
        self._stop_request = stop_request
