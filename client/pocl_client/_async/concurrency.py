"""What differs between the two clients: clocks, threads, and work side by side."""

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")


class AsyncClock:
    """The time, and waiting for it to pass."""

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await anyio.sleep(seconds)


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """What the function returns; it may block."""
    return await anyio.to_thread.run_sync(function, *arguments)


async def run_all(tasks: Sequence[Callable[[Callable[[], bool]], Awaitable[None]]], limit: int) -> None:
    """Run all tasks, `limit` at a time. The first that fails stops the others, and its exception is raised.

    Args:
        tasks: each gets a function that says whether it should stop; here a task is stopped from outside.
    """
    waiting = iter(tasks)

    async def work() -> None:
        for task in waiting:
            await task(lambda: False)

    try:
        async with anyio.create_task_group() as group:
            for _ in range(min(limit, len(tasks))):
                group.start_soon(work)
    except ExceptionGroup as failures:
        # Callers catch what the task raised, and know of no group.
        raise failures.exceptions[0] from None
