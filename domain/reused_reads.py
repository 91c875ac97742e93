"""Reads that cost much, shared by the requests of one process for a multiple of the time that they took."""

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

Value = TypeVar("Value")

REUSE_FACTOR: Final = 20
"""What was read is used for so many times as long as reading it took: a twentieth of one connection reads."""


@dataclass(frozen=True)
class TimedRead(Generic[Value]):
    """What a read gave, and what it cost."""

    value: Value
    at: float
    """When the read ended."""
    seconds: float
    """How long it took."""

    def is_fresh(self, now: float, factor: float = REUSE_FACTOR) -> bool:
        """Whether less than `factor` times its cost has passed since."""
        return now - self.at < factor * self.seconds


class ReusedRead(Generic[Value]):
    """A read whose small values are read anew each time, and whose large ones are used again for a bounded time.

    Args:
        is_large: whether a value is worth keeping.
        clock: seconds that only go up.
    """

    def __init__(self, is_large: Callable[[Value], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._is_large = is_large
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[Hashable, TimedRead[Value]] = {}

    def get(self, read: Callable[[], Value], key: Hashable = None) -> Value:
        """The value under a key, of which there are few: as it was read a moment ago, or read now.

        While one thread reads again what it knows, the others go on with that, unless nobody has asked for long.
        """
        known, now = self._known.get(key), self._clock()
        if known is None or not known.is_fresh(now, 2 * REUSE_FACTOR):
            return self._read(read, key)
        if known.is_fresh(now) or not self._lock.acquire(blocking=False):
            return known.value
        try:
            return self._read(read, key)
        finally:
            self._lock.release()

    def _read(self, read: Callable[[], Value], key: Hashable) -> Value:
        begun = self._clock()
        value = read()
        ended = self._clock()
        if self._is_large(value):
            self._known[key] = TimedRead(value, ended, ended - begun)
        else:
            self._known.pop(key, None)
        return value
