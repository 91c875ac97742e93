"""Running a watcher of jobs to its end, and counting the queries that it sends."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa

from api.jobs.watcher import JobWatcher
from domain.db import Database

Result = TypeVar("Result")


def run_and_close(coroutine: Coroutine[Any, Any, Result], *watchers: JobWatcher) -> Result:
    """Run to the end, and then close the watchers as a service does when it stops."""

    async def run() -> Result:
        try:
            return await coroutine
        finally:
            for watcher in watchers:
                await watcher.aclose()

    return asyncio.run(run())


@contextmanager
def recorded_queries(database: Database) -> Iterator[list[str]]:
    """The queries that are sent during the block."""
    queries: list[str] = []

    def record(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT"):
            queries.append(statement)

    sa.event.listen(database.engine, "before_cursor_execute", record)
    try:
        yield queries
    finally:
        sa.event.remove(database.engine, "before_cursor_execute", record)
