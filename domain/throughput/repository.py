"""How fast devices do jobs, learnt from jobs that ended well. No function commits.

The operations a second of jobs on one device spread over orders of magnitude, as a logarithmic normal distribution
does: mean and variance are kept of the logarithm, by Welford's recurrence (Welford 1962).
"""

import math
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import db_now, upsert_into
from domain.throughput.models import Throughput

START_SECONDS: Final = 15
"""What every run takes beside its operations: its start, reading samples, loading models."""
_NEAR_CLASSES: Final = 2
"""Sizes of students that are a factor of 16 apart tell of each other."""
_LEAST_SPREAD: Final = 0.2
_SPREAD_OF_ONE: Final = math.log(2)


@dataclass(frozen=True)
class Speed:
    """Operations a second, with the range in which they are expected to lie."""

    low: float
    expected: float
    high: float
    jobs: int = 0
    """The number of past jobs that it was learnt from; 0 for an assumption."""

    def seconds(self, flops: float) -> tuple[float, float, float]:
        """The least, the expected and the most seconds of a job of so many operations."""
        least, expected, most = (START_SECONDS + flops / rate for rate in (self.high, self.expected, self.low))
        return least, expected, most


def size_class(parameters: int) -> int:
    """The class of a student of so many parameters: the logarithm to base 4, rounded down."""
    return max(0, (parameters.bit_length() - 1) // 2)


def record_job(session: Session, device: str, name: str, *, size: int, flops: float, seconds: float) -> None:
    """Record that a whole job of so many planned operations took so many seconds on a device.

    Args:
        size: the class of its student.
    """
    rate = math.log(flops / max(1.0, seconds - START_SECONDS))
    first = {"device": device, "name": name[:200], "size_class": size, "jobs": 1, "mean_log": rate, "squares": 0.0}
    statement = upsert_into(session.connection(), Throughput).values(**first, updated_at=db_now())
    jobs, mean = Throughput.jobs + 1, Throughput.mean_log
    moved = mean + (rate - mean) / jobs
    changes = {
        "jobs": jobs,
        "mean_log": moved,
        "squares": Throughput.squares + (rate - mean) * (rate - moved),
        "updated_at": db_now(),
    }
    session.execute(
        statement.on_conflict_do_update(index_elements=["device", "name", "size_class"], set_=changes),
    )


def find_speed(session: Session, device: str, name: str, size: int) -> Speed | None:
    """How fast a device does jobs with students of this class, or of the nearest one; null where none was done."""
    distance = sa.func.abs(Throughput.size_class - size)
    row = session.scalars(
        sa.select(Throughput)
        .where(Throughput.device == device, Throughput.name == name[:200], distance <= _NEAR_CLASSES)
        .order_by(distance, Throughput.size_class)
        .limit(1)
    ).one_or_none()
    if row is None:
        return None
    deviation = math.sqrt(row.squares / (row.jobs - 1)) if row.jobs > 1 else _SPREAD_OF_ONE
    # Two deviations of one more job, whose mean is not known exactly either.
    spread = max(_LEAST_SPREAD, 2 * deviation * math.sqrt(1 + 1 / row.jobs))
    expected = math.exp(row.mean_log)
    return Speed(expected * math.exp(-spread), expected, expected * math.exp(spread), row.jobs)
