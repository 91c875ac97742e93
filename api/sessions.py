"""One database transaction for each request, committed before the answer is sent."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Final

from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from fastapi import Depends, Request
from sqlalchemy.orm import Session

from domain.db import Database

_AT_ONCE: Final = 30
"""Requests of one process that may have a transaction.

Fewer than there are threads (40) and pooled connections (40). Were there as many, all threads could wait for
connections, or for SQLite's write lock, while those that hold them wait for a thread to write their answer with.
"""
_turns: RunVar[CapacityLimiter] = RunVar("turns")


async def _turn() -> AsyncIterator[None]:
    """Wait without a thread and without a connection until a transaction may begin."""
    try:
        turns = _turns.get()
    except LookupError:
        turns = CapacityLimiter(_AT_ONCE)
        _turns.set(turns)
    async with turns:
        yield


transaction_slot = asynccontextmanager(_turn)
"""For a transaction outside of a route's own. A task that waits for a second turn within it may wait for ever."""
_Turn = Annotated[None, Depends(_turn, scope="function")]


def _reading(request: Request, _turn: _Turn) -> Iterator[Session]:
    database: Database = request.app.state.database
    with database.transaction(write=False) as session:
        yield session


def _writing(request: Request, _turn: _Turn) -> Iterator[Session]:
    database: Database = request.app.state.database
    with database.transaction(write=True) as session:
        yield session


# The scope "function" ends a dependency after the route and before its answer: a client never hears of a change
# that a failing commit takes back, and a slow download holds no connection.
ReadSession = Annotated[Session, Depends(_reading, scope="function")]
WriteSession = Annotated[Session, Depends(_writing, scope="function")]
