"""Copies of stored files on this machine, bounded in size and time."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_UNUSED_SECONDS: Final = 24 * 3600


@dataclass(frozen=True)
class LocalCopies:
    """Copies below a directory, each under its key."""

    root: Path
    max_bytes: int

    def use(self, copy: Path) -> bool:
        """Whether there is a copy; it counts as used now."""
        with suppress(FileNotFoundError):
            os.utime(copy)
            return copy.is_file()
        return False

    def add(self, staged: Path, copy: Path) -> None:
        """Make a file of the same file system the copy, and make room for it."""
        copy.parent.mkdir(parents=True, exist_ok=True)
        staged.replace(copy)
        self.use(copy)
        self.trim()

    def trim(self) -> None:
        """Remove copies that nobody has used for a day, and the least recently used of those that are too many."""
        found = []
        for path in self.root.glob("[!.]*/**/*"):
            with suppress(FileNotFoundError):
                if path.is_file():
                    state = path.stat()
                    found.append((state.st_mtime, state.st_size, path))
        total = 0
        for used_at, size, path in sorted(found, reverse=True):
            total += size
            if total > self.max_bytes or time.time() - used_at > _UNUSED_SECONDS:
                path.unlink(missing_ok=True)
