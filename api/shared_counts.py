"""Counts of requests in memory that the processes of one parent share, so that a limit holds for all of them together.

It is a storage of `limits` for fixed windows. The parent makes it, and the processes that it forks use it.
"""

import fcntl
import hashlib
import mmap
import os
import struct
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from limits.storage import Storage

_ENTRY: Final = struct.Struct("<16sdq")
"""The digest of a key, the end of its window in seconds since 1970, and the count."""
_EMPTY: Final = bytes(16)
_LOCK_POLL_SECONDS: Final = 0.0005


class SharedCounts(Storage):
    """A hash table of counts, with the eight entries behind the place of a key as its bucket.

    A bucket that is full forgets the window that ends first. The lock is one of the kernel, which it takes back from a
    process that dies.

    Args:
        entries: how many counts there is room for.
        lock_seconds: how long a method waits for the lock.

    Raises:
        TimeoutError: by all methods, where a process that stands still holds the lock.
    """

    STORAGE_SCHEME = None
    _BUCKET: Final = 8

    def __init__(self, entries: int = 16_384, lock_seconds: float = 0.05) -> None:
        super().__init__()
        self._entries = entries
        self._lock_seconds = lock_seconds
        # The lock of a file belongs to a process, and not to the descriptor that a fork shares.
        with tempfile.TemporaryFile() as file:
            file.truncate(entries * _ENTRY.size)
            self._memory = mmap.mmap(file.fileno(), entries * _ENTRY.size)
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def base_exceptions(self) -> type[Exception]:
        return TimeoutError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        with self._locked():
            offset, digest = self._find(key)
            _, ends_at, count = _ENTRY.unpack_from(self._memory, offset)
            now = time.time()
            if not self._is_current(offset, digest, now):
                ends_at, count = now + expiry, 0
            _ENTRY.pack_into(self._memory, offset, digest, ends_at, count + amount)
            return int(count + amount)

    def get(self, key: str) -> int:
        with self._locked():
            offset, digest = self._find(key)
            return int(_ENTRY.unpack_from(self._memory, offset)[2]) if self._is_current(offset, digest) else 0

    def get_expiry(self, key: str) -> float:
        with self._locked():
            offset, digest = self._find(key)
            is_current = self._is_current(offset, digest)
            return float(_ENTRY.unpack_from(self._memory, offset)[1]) if is_current else time.time()

    def check(self) -> bool:
        return True

    def reset(self) -> int | None:
        with self._locked():
            self._memory[:] = bytes(len(self._memory))
        return None

    def clear(self, key: str) -> None:
        with self._locked():
            offset, digest = self._find(key)
            if self._is_current(offset, digest):
                _ENTRY.pack_into(self._memory, offset, _EMPTY, 0.0, 0)

    def _find(self, key: str) -> tuple[int, bytes]:
        """The offset of a key's entry, or of the one in its bucket that it may take; and the key's digest."""
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        place = int.from_bytes(digest[:8], "little")
        offsets = [(place + step) % self._entries * _ENTRY.size for step in range(self._BUCKET)]
        oldest = offsets[0]
        for offset in offsets:
            stored, ends_at, _ = _ENTRY.unpack_from(self._memory, offset)
            if stored == digest:
                return offset, digest
            if ends_at < _ENTRY.unpack_from(self._memory, oldest)[1]:
                oldest = offset
        return oldest, digest

    def _is_current(self, offset: int, digest: bytes, now: float | None = None) -> bool:
        stored, ends_at, _ = _ENTRY.unpack_from(self._memory, offset)
        return bool(stored == digest and ends_at > (time.time() if now is None else now))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = self._descriptor
        deadline = time.monotonic() + self._lock_seconds
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    raise TimeoutError("another process holds the lock of the counts") from None
                time.sleep(_LOCK_POLL_SECONDS)
        try:
            yield
        finally:
            fcntl.lockf(descriptor, fcntl.LOCK_UN)
