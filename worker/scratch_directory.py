"""A directory for the files of one process, which another one removes where that process was killed."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ScratchDirectory:
    """A directory of this process, locked while the process lives."""

    path: Path
    lock: int
    """The descriptor of the lock."""

    @classmethod
    def make(cls, root: Path) -> "ScratchDirectory":
        """Make one below `root`, and remove those whose processes have ended."""
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in root.iterdir():
            with suppress(OSError):
                lock = os.open(left, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(lock)
        path = Path(tempfile.mkdtemp(prefix="scheduler-", dir=root))
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return cls(path, lock)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)
