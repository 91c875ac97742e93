"""Figures out of the database for scrapes: read at most once in a while, for all scrapers together, and waited for
briefly.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import structlog
from anyio.to_thread import run_sync

from domain.database_errors import DatabaseUnavailable

Figures = TypeVar("Figures")

_MAX_AGE_SECONDS: Final = 120.0
"""Older figures are not shown: none are better than wrong ones."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Known(Generic[Figures]):
    figures: Figures
    at: float


class FiguresCache(Generic[Figures]):
    """The newest figures, read in a thread by one read at a time. It is used from the event loop alone.

    Args:
        read: reads them; raises DatabaseUnavailable.
        seconds: figures that are younger are not read again.
    """

    def __init__(
        self, read: Callable[[], Figures], *, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read = read
        self._seconds = seconds
        self._clock = clock
        self._known: _Known[Figures] | None = None
        self._task: asyncio.Task[None] | None = None

    async def get(self, *, patience: float) -> tuple[Figures, float] | None:
        """The figures and their age in seconds; null where they cannot be read.

        Where a read takes longer than `patience` seconds, those of before: it goes on for the next scrape.
        """
        if self._known is None or self._clock() - self._known.at >= self._seconds:
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._refresh())
            await asyncio.wait([self._task], timeout=patience)
        known = self._known
        if known is None or (age := self._clock() - known.at) > max(_MAX_AGE_SECONDS, 2 * self._seconds):
            return None
        return known.figures, age

    async def _refresh(self) -> None:
        began = self._clock()
        try:
            self._known = _Known(await run_sync(self._read), began)
        except DatabaseUnavailable as error:
            self._known = None
            _log.warning("figures_not_read", error=str(error))
        except Exception:  # noqa: BLE001 - a scrape shows the rest, and nobody else would hear of it
            self._known = None
            _log.exception("figures_not_read")
