"""Single flight: concurrent requests for the same value share one read of the database, and some values are cached."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_THREADS: Final = 4
"""Reads of one cache at a time. They have threads of their own: requests that wait for a lock take none from them."""


@dataclass
class _InFlight:
    """The reads in flight on one event loop."""

    tasks: dict[Any, "asyncio.Task[Any]"] = field(default_factory=dict)
    limiter: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_THREADS))


class SingleFlightCache(Generic[Key, Value]):
    """A least recently used (LRU) cache of reads by key, with single flight: of each key one read runs at a time.

    Args:
        read: called in a thread.
        cacheable: whether a value stays true for ever, so that it may be cached.
        size: entries of the cache at most.
    """

    def __init__(self, read: Callable[[Key], Value], cacheable: Callable[[Key, Value], bool], size: int) -> None:
        self._read = read
        self._cacheable = cacheable
        self._size = size
        self._entries: OrderedDict[Key, Value] = OrderedDict()
        self._in_flight: RunVar[_InFlight] = RunVar("single_flight")

    async def get(self, key: Key) -> Value:
        """The value of `key`: cached, or read now."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        in_flight = self._in_flight.get(None)
        if in_flight is None:
            in_flight = _InFlight()
            self._in_flight.set(in_flight)
        task = in_flight.tasks.get(key)
        if task is None:
            task = in_flight.tasks[key] = asyncio.create_task(self._read_and_cache(in_flight, key))
        # A request that is cancelled must not cancel the read, which others share.
        value: Value = await asyncio.shield(task)
        return value

    async def _read_and_cache(self, in_flight: _InFlight, key: Key) -> Value:
        try:
            value = await run_sync(self._read, key, limiter=in_flight.limiter)
        finally:
            del in_flight.tasks[key]
        if self._cacheable(key, value):
            self._entries[key] = value
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return value
