"""Capacity limiters of anyio, one for each event loop: a limiter may be used from one loop alone."""

from anyio import CapacityLimiter
from anyio.lowlevel import RunVar


class LoopLimiter:
    """How many tasks of one event loop may do something at a time.

    Args:
        name: unique in the process.
        limit: how many.
    """

    def __init__(self, name: str, limit: int) -> None:
        self.limit = limit
        self._limiter: RunVar[CapacityLimiter] = RunVar(name)

    def get(self) -> CapacityLimiter:
        """The limiter of the event loop that runs now; made by the first who asks."""
        limiter = self._limiter.get(None)
        if limiter is None:
            limiter = CapacityLimiter(self.limit)
            self._limiter.set(limiter)
        return limiter
