"""Reads of the database that many requests want at once, done once for all of them."""

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
"""Reads of one kind at a time. They have threads of their own: requests that wait for a lock take none from them."""


@dataclass
class _InFlight:
    """What belongs to one event loop."""

    tasks: dict[Any, "asyncio.Task[Any]"] = field(default_factory=dict)
    limiter: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_THREADS))


class SingleFlightCache(Generic[Key, Value]):
    """Reads by key in a thread: requests that want the same at once share one read, and some results are kept.

    Args:
        read: called in a thread.
        cacheable: whether a result will be the same for ever, so that it may be kept.
        size: results that are kept at most; what was wanted longest ago goes first.
    """

    def __init__(self, read: Callable[[Key], Value], cacheable: Callable[[Key, Value], bool], size: int) -> None:
        self._read = read
        self._lasting = cacheable
        self._size = size
        self._kept: OrderedDict[Key, Value] = OrderedDict()
        self._here: RunVar[_InFlight] = RunVar("shared_reads")

    async def get(self, key: Key) -> Value:
        """What `read` made of `key`, just now or, if it lasts, before."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        here = self._here.get(None)
        if here is None:
            here = _InFlight()
            self._here.set(here)
        task = here.tasks.get(key)
        if task is None:
            task = here.tasks[key] = asyncio.create_task(self._read_and_keep(here, key))
        # A request whose client goes away takes the read from nobody else.
        value: Value = await asyncio.shield(task)
        return value

    async def _read_and_keep(self, here: _InFlight, key: Key) -> Value:
        try:
            value = await run_sync(self._read, key, limiter=here.limiter)
        finally:
            del here.tasks[key]
        if self._lasting(key, value):
            self._kept[key] = value
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return value
