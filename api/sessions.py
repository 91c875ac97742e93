"""One database transaction for each request, committed before the response is sent, and turns at transactions.

Requests take turns by what they cost: many short ones at a time, few that read much of a job, and those that plan a
job, which look at models and samples for seconds. None of them waits for another kind.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import Depends
from sqlalchemy.orm import Session

from api.dependencies import DatabaseDep
from api.loop_limiters import LoopLimiter


class _Turns:
    """The requests of one process that may be at work at a time; others wait without a thread and a connection.

    All kinds together are fewer than there are threads (40) and pooled connections (40, of which single flight and the
    watcher need some). Were there as many, all threads could wait for connections, or for SQLite's write lock, while
    the requests that hold them wait for a thread to render a response with.
    """

    def __init__(self, kind: str, limit: int) -> None:
        self._limiters = LoopLimiter(f"turns_{kind}", limit)

    @property
    def usage(self) -> "SlotUsage":
        """The use of these turns now; to be asked for from the event loop."""
        limiter = self._limiters.get()
        return SlotUsage(self._limiters.limit, limiter.borrowed_tokens, limiter.statistics().tasks_waiting)

    async def take(self) -> AsyncIterator[None]:
        """Wait for a turn, and hold it until the generator is closed."""
        async with self._limiters.get():
            yield


_short: Final = _Turns("short", 16)
_heavy: Final = _Turns("heavy", 3)
"""Each may keep a core busy for some hundredths of a second."""
_planning: Final = _Turns("planning", 11)
"""As many as may encode samples or wait for it, and one more: see :mod:`domain.encoding_checks`."""


@dataclass(frozen=True)
class SlotUsage:
    """How many requests of this process have a turn, and wait for one, all kinds together."""

    capacity: int
    in_use: int = 0
    waiting: int = 0


def transaction_slots() -> SlotUsage:
    """The use of the turns now; to be called from the event loop."""
    usages = [turns.usage for turns in (_short, _heavy, _planning)]
    return SlotUsage(
        sum(usage.capacity for usage in usages),
        sum(usage.in_use for usage in usages),
        sum(usage.waiting for usage in usages),
    )


transaction_slot = asynccontextmanager(_short.take)
"""For a transaction outside of a route's own. A task that waits for a second slot within it may wait for ever."""
heavy_slot = asynccontextmanager(_heavy.take)
"""The same for a transaction that reads much."""
TransactionSlot = Annotated[None, Depends(_short.take, scope="function")]
"""For a route that opens its transactions itself."""
PlanningSlot = Annotated[None, Depends(_planning.take, scope="function")]
"""For a route that looks at models or samples, and opens its transactions itself."""
_HeavySlot = Annotated[None, Depends(_heavy.take, scope="function")]


def _read(database: DatabaseDep, _slot: TransactionSlot) -> Iterator[Session]:
    with database.transaction(write=False) as session:
        yield session


def _read_much(database: DatabaseDep, _slot: _HeavySlot) -> Iterator[Session]:
    with database.transaction(write=False) as session:
        yield session


def _write(database: DatabaseDep, _slot: TransactionSlot) -> Iterator[Session]:
    with database.transaction(write=True) as session:
        yield session


# The scope "function" ends a dependency after the route and before its response: a client never hears of a change
# that a failing commit takes back, and a slow download holds no connection.
ReadSession = Annotated[Session, Depends(_read, scope="function")]
HeavyReadSession = Annotated[Session, Depends(_read_much, scope="function")]
"""For a route that reads much: hundreds of rows, or long texts."""
WriteSession = Annotated[Session, Depends(_write, scope="function")]
