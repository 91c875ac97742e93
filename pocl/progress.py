"""Progress at a bounded rate: a fast phase must not fill the log."""

import time
from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""


def throttle(seconds: float, report: OnProgress, *, clock: Callable[[], float] = time.monotonic) -> OnProgress:
    """`report`, but not more often than this; the end is always reported."""
    last: float | None = None

    def throttled(done: int, total: int) -> None:
        nonlocal last
        now = clock()
        if done < total and last is not None and now - last < seconds:
            return
        last = now
        report(done, total)

    return throttled
