"""Metrics of long jobs, thinned: of each window of steps the first, the last, the least and the greatest value stay.

Windows are powers of two and grow with the number of steps, so that the rows of a job stay bounded. A wide window has
the same four values whether it is thinned at once or out of narrower ones: what stays follows from the values and the
number of steps alone, not from when it was thinned, and a resumed attempt that writes steps again ends with the same
rows.
"""

from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.jobs.models import Job, JobMetric

MAX_WHOLE_STEPS: Final = 8192
"""Up to so many steps every value stays."""
_MAX_WINDOWS: Final = 2048
_MIN_WINDOW: Final = 8
"""A window keeps four values: one of four steps would drop nothing."""
_MIN_CHUNK: Final = 1024
"""Windows are thinned so many steps at a time, so that the newest steps are whole."""


def window_for(steps: int) -> int:
    """The steps of a window for a job that has come so far; 1 where every value stays."""
    if steps <= MAX_WHOLE_STEPS:
        return 1
    window = _MIN_WINDOW
    while steps > window * _MAX_WINDOWS:
        window *= 2
    return window


def thin_metrics(session: Session, job: Job, *, first_step: int, last_step: int) -> dict[str, int]:
    """Thin the metrics of a job after values were written.

    Args:
        first_step, last_step: the range of steps of these values, both inclusive. An attempt that resumed may write
            steps again that were thinned.

    Returns:
        the columns of the job that change.
    """
    window = max(job.metric_window, window_for(last_step))
    chunk = max(_MIN_CHUNK, window)
    start = 0 if window != job.metric_window else min(job.metrics_thinned_to, first_step // window * window)
    end = max(start, last_step // chunk * chunk)
    columns = {"metric_window": window, "metrics_thinned_to": end if window > 1 else 0}
    if window > 1 and end > start:
        columns["metrics_dropped"] = job.metrics_dropped + _delete_inner(session, job.id, window, start, end)
    return columns


def _delete_inner(session: Session, job_id: str, window: int, start: int, end: int) -> int:
    """Delete what is neither first, last, least nor greatest of its window, from step `start` to before `end`."""
    orders = (
        (JobMetric.step,),
        (JobMetric.step.desc(),),
        (JobMetric.value, JobMetric.step),
        (JobMetric.value.desc(), JobMetric.step),
    )
    partition = (JobMetric.name, JobMetric.step // window)
    places = [
        sa.func.row_number().over(partition_by=partition, order_by=order).label(f"place_{index}")
        for index, order in enumerate(orders)
    ]
    numbered = (
        sa.select(JobMetric.name, JobMetric.step, *places)
        .where(JobMetric.job_id == job_id, JobMetric.step >= start, JobMetric.step < end)
        .subquery()
    )
    inner = sa.select(numbered.c.name, numbered.c.step).where(
        *(numbered.c[f"place_{index}"] > 1 for index in range(len(orders)))
    )
    deleted = sa.delete(JobMetric).where(
        JobMetric.job_id == job_id, sa.tuple_(JobMetric.name, JobMetric.step).in_(inner)
    )
    result = session.execute(deleted, execution_options={"synchronize_session": False})
    return int(result.rowcount)  # type: ignore[attr-defined] # A DELETE has one.
