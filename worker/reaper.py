"""Which expired leases are reaped, and which are granted one more.

A lease tells of a lost worker only while heartbeats could arrive. When the database was unavailable, the machine was
suspended or the database's clock was put forward, every lease expires and no worker is lost. All three look alike from
here: by the clock of the database more time went by since the last look than lies between two looks.
"""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
import structlog

from domain.db import Database, db_now
from domain.jobs.leases import expire_waiting, extend_expired, reap_expired, shorten_leases

_log = structlog.get_logger(__name__)


@dataclass
class Reaper:
    """Looks for expired leases, and remembers when it last did."""

    database: Database
    lease_seconds: float
    interval: float
    """Seconds between two looks."""
    looked_at: datetime | None = None
    """The last look by the clock of the database; null before the first."""

    def look(self) -> list[str]:
        """Requeue or end jobs whose lease has expired, and end those that waited too long; the ids of the former."""
        with self.database.transaction(write=True) as session:
            now = session.scalars(sa.select(db_now())).one()
            extended = 0
            if self._is_late(now):
                extended = extend_expired(session, lease_seconds=self.lease_seconds, since=self.looked_at)
            shorten_leases(session, lease_seconds=self.lease_seconds)
            reaped = reap_expired(session)
            overdue = expire_waiting(session)
        # Known only now that the leases are extended in the database.
        self.looked_at = now
        if extended:
            _log.warning("leases_extended", leases=extended, hint="No heartbeat could arrive, or the clock was set.")
        for job_id in reaped:
            _log.warning("lease_expired", job_id=job_id)
        for job_id in overdue:
            _log.warning("max_wait_exceeded", job_id=job_id)
        return reaped

    def _is_late(self, now: datetime) -> bool:
        """Whether the last look is so long ago that the lease of a worker which is well may have expired meanwhile."""
        if self.looked_at is None:
            return True
        return (now - self.looked_at).total_seconds() > self.interval + self.lease_seconds / 2
