"""The log file of a child process: written by the child itself, its size bounded by the parent."""

import os
from pathlib import Path
from typing import IO


class BoundedLog:
    """A file that a process appends to and that never holds much more than `limit` bytes.

    The child writes to the file without a pipe, so it never waits for its parent. What it writes during :meth:`trim`
    can be lost.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self._limit = limit

    def open(self) -> IO[bytes]:
        """Open the file for the child. In append mode each write goes to the end, also after a trim."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.open("ab")

    def trim(self) -> None:
        """Drop the older half of the file once it holds more than `limit` bytes."""
        try:
            if self.path.stat().st_size <= self._limit:
                return
        except FileNotFoundError:
            return
        kept = self.tail(self._limit // 2)
        with self.path.open("r+b") as file:
            file.truncate(0)
        with self.open() as file:
            file.write(b"[older lines dropped]\n" + kept)

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
