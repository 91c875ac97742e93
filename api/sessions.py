"""One database transaction for each request, committed before the response is sent."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Final

from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from fastapi import Depends
from sqlalchemy.orm import Session

from api.dependencies import DatabaseDep

_MAX_TRANSACTIONS: Final = 30
"""Requests of one process that may have a transaction at a time.

Fewer than there are threads (40) and pooled connections (40). Were there as many, all threads could wait for
connections, or for SQLite's write lock, while the requests that hold them wait for a thread to render a response with.
"""
_slots: RunVar[CapacityLimiter] = RunVar("transaction_slots")


async def _take_slot() -> AsyncIterator[None]:
    """Wait without a thread and without a connection until a transaction may begin."""
    try:
        slots = _slots.get()
    except LookupError:
        slots = CapacityLimiter(_MAX_TRANSACTIONS)
        _slots.set(slots)
    async with slots:
        yield


transaction_slot = asynccontextmanager(_take_slot)
"""For a transaction outside of a route's own. A task that waits for a second slot within it may wait for ever."""
TransactionSlot = Annotated[None, Depends(_take_slot, scope="function")]
"""For a route that opens its transactions itself."""


def _read(database: DatabaseDep, _slot: TransactionSlot) -> Iterator[Session]:
    with database.transaction(write=False) as session:
        yield session


def _write(database: DatabaseDep, _slot: TransactionSlot) -> Iterator[Session]:
    with database.transaction(write=True) as session:
        yield session


# The scope "function" ends a dependency after the route and before its response: a client never hears of a change
# that a failing commit takes back, and a slow download holds no connection.
ReadSession = Annotated[Session, Depends(_read, scope="function")]
WriteSession = Annotated[Session, Depends(_write, scope="function")]
