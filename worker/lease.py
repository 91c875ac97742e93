"""The lease of an attempt on its job: renewed by heartbeats, which also bring stop requests.

While no database answers the attempt goes on: nobody can claim its job then, and the scheduler grants one more lease
once the database is back. Whether another worker reached the database meanwhile is for the fencing token to say.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextvars import copy_context
from typing import TypeVar

import structlog

from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.errors import LostLease
from domain.jobs import leases
from domain.jobs.leases import Claim
from domain.jobs.states import DATABASE_UNAVAILABLE as UNAVAILABLE_REASON
from domain.jobs.states import StopRequest

_log = structlog.get_logger(__name__)

Result = TypeVar("Result")


class Lease:
    """Renews the lease when it is due, and ends the attempt where its job has used up its running time."""

    def __init__(
        self,
        database: Database,
        claim: Claim,
        *,
        seconds: float,
        interval: float,
        should_stop: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        seconds: how long the lease lasts after each renewal.
        interval: seconds between two renewals.
        should_stop: whether the worker shuts down: it then waits for the database no longer than the lease lasts.
        """
        self._database = database
        self._claim = claim
        self._seconds = seconds
        self._interval = interval
        self._should_stop = should_stop
        self._clock = clock
        self._claimed_at = self._renewed_at = self._tried_at = clock()
        self._stop_request: StopRequest | None = None
        self._unavailable = False
        """Whether the database did not answer the last renewal."""

    @property
    def seconds_run(self) -> float:
        """How long the attempt has held the job, by a clock that is never set."""
        return self._clock() - self._claimed_at

    def heartbeat_if_due(self) -> StopRequest | None:
        """Renew the lease when that is due, and return the stop request that is pending.

        Raises:
            LostLease: the job is no longer this attempt's, or the worker shuts down and the database stays away.
        """
        if self._clock() - self._tried_at >= self._interval:
            self._heartbeat()
        limit = self._claim.runtime_left_seconds
        if limit is not None and self.seconds_run >= limit and self._stop_request is not StopRequest.CANCEL:
            return StopRequest.EXPIRE
        return self._stop_request

    def is_asked_to_stop(self) -> bool:
        """Whether something asks the attempt to stop at once: a client, a limit, or the worker, which shuts down.

        Raises:
            LostLease: as :meth:`heartbeat_if_due` does.
        """
        request = self.heartbeat_if_due()
        return self._should_stop() or (request is not None and not request.waits_for_stage_end)

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
        silence = self._tried_at - self._renewed_at
        try:
            with self._database.transaction(write=True) as session:
                stop_request = leases.heartbeat(session, self._claim, self._seconds)
                if silence >= self._seconds:
                    reason = UNAVAILABLE_REASON.code if self._unavailable else "worker_suspended"
                    leases.record_resumed_lease(session, self._claim, reason, silence)
        except DatabaseUnavailable as error:
            if not self._unavailable:
                _log.warning("database_unavailable", error=str(error), hint="The engine goes on.")
            self._unavailable = True
            if self._should_stop() and self._clock() - self._renewed_at >= self._seconds:
                raise LostLease from error
            return
        if self._unavailable:
            _log.info("database_available", seconds=round(silence, 1))
        self._renewed_at, self._unavailable = self._tried_at, False
        self._stop_request = stop_request
