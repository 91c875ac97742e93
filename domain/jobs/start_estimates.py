"""When workers come free for queued jobs, as if every job took as long as recent ones did on average.

No function commits. What many held jobs say is read once for many estimates: see :mod:`domain.reused_reads`.
"""

import heapq
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import db_now, kept_by_database
from domain.jobs.fleet import LARGE_FLEET, FleetWorker
from domain.jobs.models import Job
from domain.jobs.states import HELD, JobStatus
from domain.reused_reads import ReusedRead

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MINUTE: Final = timedelta(minutes=1)
_RECENT_JOBS: Final = 50
_MAX_ESTIMATED_AHEAD: Final = 500
"""With more jobs ahead than these no start is estimated."""
_NOW: Final = sa.select(db_now())


def estimate_start(session: Session, able: Sequence[FleetWorker], ahead: int) -> datetime | None:
    """When one of the workers `able` comes free for a job with so many ahead; null where too little is known.

    The estimate is in whole minutes, so that a job's snapshot does not change with every query.
    """
    if not able or ahead > _MAX_ESTIMATED_AHEAD:
        return None
    return kept_by_database(session, _EstimatorReader).get(session).estimate([worker.name for worker in able], ahead)


def round_up_to_minute(moment: datetime) -> datetime:
    """The next whole minute, or the moment itself."""
    return moment + (_EPOCH - moment) % _MINUTE


class _EstimatorReader:
    """Reads what estimates of a database need."""

    def __init__(self) -> None:
        self._read: ReusedRead[_StartEstimator] = ReusedRead(lambda estimator: estimator.held >= LARGE_FLEET)

    def get(self, session: Session) -> "_StartEstimator":
        return self._read.get(lambda: _read_estimator(session))


class _StartEstimator:
    """Estimates at one moment.

    Args:
        free_at: when each worker that holds a job comes free; null where that is not known.
        mean_duration: of the jobs that succeeded last; null before the first.
    """

    def __init__(self, now: datetime, free_at: Mapping[str, datetime | None], mean_duration: timedelta | None) -> None:
        self._now = now
        self._free_at = free_at
        self._mean_duration = mean_duration
        self._starts: dict[frozenset[str], list[datetime]] = {}

    @property
    def held(self) -> int:
        """How many workers hold a job."""
        return len(self._free_at)

    def estimate(self, able: Sequence[str], ahead: int) -> datetime | None:
        """See :func:`estimate_start`."""
        names = frozenset(able)
        starts = self._starts.get(names)
        if starts is None:
            starts = self._starts[names] = self._simulate(able)
        return round_up_to_minute(starts[ahead]) if ahead < len(starts) else None

    def _simulate(self, able: Sequence[str]) -> list[datetime]:
        """The estimated start for 0, 1, ... jobs ahead: each job goes to the worker that comes free first."""
        free_at = []
        for worker in able:
            moment = self._free_at.get(worker, self._now)
            if moment is None:
                return []
            free_at.append(moment)
        heapq.heapify(free_at)
        starts = [free_at[0]]
        while self._mean_duration is not None and len(starts) <= _MAX_ESTIMATED_AHEAD:
            heapq.heapreplace(free_at, free_at[0] + self._mean_duration)
            starts.append(free_at[0])
        return starts


def _read_estimator(session: Session) -> _StartEstimator:
    now = session.scalars(_NOW).one()
    mean_duration = _mean_recent_duration(session)
    free_at = {
        str(row.lease_owner): _estimate_end(now, mean_duration, row.eta_seconds, row.progress_at, row.started_at)
        for row in session.execute(_held_statement())
    }
    return _StartEstimator(now, free_at, mean_duration)


@cache
def _held_statement() -> sa.Select[str | None, float | None, datetime | None, datetime | None]:
    columns = (Job.lease_owner, Job.eta_seconds, Job.progress_at, Job.started_at)
    return sa.select(*columns).where(Job.status.in_(HELD), Job.lease_owner.is_not(None))


def _estimate_end(
    now: datetime,
    mean_duration: timedelta | None,
    eta_seconds: float | None,
    progress_at: datetime | None,
    started_at: datetime | None,
) -> datetime | None:
    """When a held job ends; null where that is not known.

    Args:
        eta_seconds: what was left of it at `progress_at`.
    """
    if eta_seconds is not None and progress_at is not None:
        return max(now, progress_at + timedelta(seconds=eta_seconds))
    if mean_duration is None or started_at is None:
        return None
    return max(now, started_at + mean_duration)


@cache
def _recent_statement() -> sa.Select[datetime | None, datetime | None]:
    statement = sa.select(Job.started_at, Job.finished_at).where(Job.status == JobStatus.SUCCEEDED)
    return statement.order_by(Job.finished_at.desc()).limit(_RECENT_JOBS)


def _mean_recent_duration(session: Session) -> timedelta | None:
    """The mean duration of the jobs that succeeded last; null before the first."""
    ended = session.execute(_recent_statement()).all()
    durations = [finished - started for started, finished in ended if started is not None and finished is not None]
    return sum(durations, timedelta()) / len(durations) if durations else None
