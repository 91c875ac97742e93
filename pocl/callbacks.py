"""What callers give the engine to be called with, and a bound on how often."""

import time
from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""
ShouldStop = Callable[[], bool]
"""Polled between pieces of work; true stops the work."""


def throttle(
    on_progress: OnProgress, *, seconds: float = 1.0, clock: Callable[[], float] = time.monotonic
) -> OnProgress:
    """`on_progress`, called at most once in this many seconds; the end is always reported.

    A fast phase would otherwise fill the log.
    """
    last_report: float | None = None

    def throttled(done: int, total: int) -> None:
        nonlocal last_report
        now = clock()
        if done < total and last_report is not None and now - last_report < seconds:
            return
        last_report = now
        on_progress(done, total)

    return throttled
