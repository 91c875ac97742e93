"""The cache that runs share: a directory of entries, bounded in size, for any number of processes.

    ROOT/KIND/KEY/...       an entry; KEY is a digest of all that its content depends on
    ROOT/pins/JOB.json      entries that JOB will need again

The least recently used entries (LRU) are evicted when room is needed, but for those that a process holds and those
that a job has pinned, for instance while it is paused. This module is free of torch, so that a service can unpin.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pocl.errors import CheckpointCorrupt
from pocl.storage.manifest import SCRATCH_PREFIX, discard, new_directory, replace_file, verify

PINS = "pins"
PINNED_SECONDS = 30 * 24 * 3600
"""The time to live of a pin: the job of an older one was given up."""
ABANDONED_SECONDS = 3600
"""The age beyond which a scratch directory was left by a killed process: none is written for so long."""


@dataclass(frozen=True)
class SharedCache:
    """A bounded cache: the entries below `root` together have at most `max_bytes`."""

    root: Path
    max_bytes: int
    pinning_job: str | None = None
    """The job that pins the entries that are used here; None pins nothing."""

    @contextmanager
    def hold(self, kind: str, key: str) -> Iterator[Path]:
        """Give the directory of an entry, which is made if need be and is not evicted while the block runs."""
        path = self.root / kind / key
        while (handle := self._lock(path)) is None:
            # The entry was evicted before it was locked.
            continue
        try:
            os.utime(path)
            self._pin(f"{kind}/{key}")
            yield path
        finally:
            os.close(handle)

    def _lock(self, path: Path) -> int | None:
        """Take a shared lock on the directory; None where the directory was evicted since it was made."""
        # An eviction between the failure of mkdir and its look at what is there makes it raise in spite of `exist_ok`.
        with suppress(FileExistsError):
            path.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(handle)):
                return handle
        os.close(handle)
        return None

    def find(self, kind: str, key: str) -> Path | None:
        """The directory of a whole entry that :meth:`add` made; None if there is none. A damaged entry is removed."""
        path = self.root / kind / key
        if not path.is_dir():
            return None
        try:
            verify(path)
            os.utime(path)
        except (CheckpointCorrupt, FileNotFoundError):
            # The entry is damaged, or was evicted meanwhile.
            with suppress(FileNotFoundError):
                discard(path)
            return None
        return path

    @contextmanager
    def add(self, kind: str, key: str) -> Iterator[Path]:
        """Give a scratch directory, which becomes the entry when the block ends.

        Raises:
            DiskFull: when there is no space; nothing is added then.
        """
        with new_directory(self.root / kind / key) as scratch:
            yield scratch
        self.make_room(0, besides=f"{kind}/{key}")

    def make_room(self, needed: int, *, besides: str) -> bool:
        """Evict entries until the entry `besides` can grow by `needed` bytes.

        Args:
            besides: `KIND/KEY` of the entry that grows; it is not evicted.

        Returns:
            Whether the bytes fit now.
        """
        pinned = {*self._pinned_entries(), besides}
        entries = {entry: _bytes_below(entry) for entry in self._entries()}
        total = sum(entries.values()) + needed
        for entry in sorted(entries, key=_last_used):
            if total <= self.max_bytes:
                break
            if entry.relative_to(self.root).as_posix() not in pinned and _evict(entry):
                total -= entries[entry]
        return total <= self.max_bytes

    def sweep(self) -> None:
        """Remove the scratch directories of killed processes; a young one may be in use."""
        for scratch in self.root.rglob(f"{SCRATCH_PREFIX}*"):
            if time.time() - _last_used(scratch) > ABANDONED_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)

    def unpin(self) -> None:
        """Drop the pin of the job, which will not need its entries again."""
        if self.pinning_job is not None:
            _pin_file(self.root, self.pinning_job).unlink(missing_ok=True)

    def pinning_jobs(self) -> set[str]:
        """The jobs that have a pin, expired or not."""
        return {pin.stem for pin in (self.root / PINS).glob("*.json")}

    def _entries(self) -> list[Path]:
        return [entry for entry in self.root.glob("*/*") if entry.is_dir() and not entry.name.startswith(".")]

    def _pin(self, entry: str) -> None:
        if self.pinning_job is None:
            return
        path = _pin_file(self.root, self.pinning_job)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(sorted({*_read_pin(path), entry})))

    def _pinned_entries(self) -> set[str]:
        now = time.time()
        pins = [pin for pin in (self.root / PINS).glob("*.json") if now - _last_used(pin) < PINNED_SECONDS]
        return {entry for pin in pins for entry in _read_pin(pin)}


def _pin_file(root: Path, job: str) -> Path:
    return root / PINS / f"{job}.json"


def _read_pin(path: Path) -> set[str]:
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return set()
    return {entry for entry in entries if isinstance(entry, str)} if isinstance(entries, list) else set()


def _evict(entry: Path) -> bool:
    """Remove an entry unless a process holds it; whether it is gone."""
    try:
        handle = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        discard(entry)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        # Another process has evicted it meanwhile.
        return True
    finally:
        os.close(handle)
    return True


def _last_used(path: Path) -> float:
    """The modification time, which every use sets; 0 for what is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _bytes_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            # Another process has evicted it meanwhile.
            continue
    return total
