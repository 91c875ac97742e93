"""The log file of a child process: written by the child itself, its size bounded by the parent."""

import os
from pathlib import Path
from typing import IO, Final

_MARK: Final = b"[older lines dropped]\n"


class BoundedLog:
    """A file that a process appends to and that never holds much more than `limit` bytes.

    The child writes to the file without a pipe, so it never waits for its parent. What it writes during :meth:`trim`
    can be lost.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self._limit = limit
        self._read_up_to = 0
        """Where the next reading begins, in bytes of the file."""
        self._skipped = 0
        """Bytes that were dropped before they were read."""

    def open(self) -> IO[bytes]:
        """Open the file for the child. In append mode each write goes to the end, also after a trim."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.open("ab")

    def trim(self) -> None:
        """Drop the older half of the file once it holds more than `limit` bytes."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return
        if size <= self._limit:
            return
        kept = self.tail(self._limit // 2)
        with self.path.open("r+b") as file:
            file.truncate(0)
        with self.open() as file:
            file.write(_MARK + kept)
        unread = max(0, size - self._read_up_to)
        self._skipped += max(0, unread - len(kept))
        self._read_up_to = len(_MARK) + max(0, len(kept) - unread)

    @property
    def unread(self) -> int:
        """How many bytes were added since the last :meth:`read_new`."""
        try:
            return max(0, self.path.stat().st_size - self._read_up_to)
        except FileNotFoundError:
            return 0

    def read_new(self, size: int) -> tuple[int, bytes]:
        """Read what was added since the last time: the last `size` bytes of it.

        Returns:
            how many bytes before them were left out, and those that were read.
        """
        unread = self.unread
        skipped, self._skipped = self._skipped + max(0, unread - size), 0
        if not unread:
            return skipped, b""
        begin = self._read_up_to + max(0, unread - size)
        with self.path.open("rb") as file:
            file.seek(begin)
            read = file.read(min(unread, size))
        self._read_up_to = begin + len(read)
        return skipped, read

    def tail(self, size: int) -> bytes:
        """The last `size` bytes, from the start of a line on."""
        try:
            with self.path.open("rb") as file:
                length = file.seek(0, os.SEEK_END)
                file.seek(max(0, length - size))
                read = file.read(size)
        except FileNotFoundError:
            return b""
        return read if length <= size else read.partition(b"\n")[2]
