"""What one run computed and another can use: a directory of entries, bounded in size, shared by processes.

    ROOT/KIND/KEY/...       an entry; KEY is a digest of all that its content depends on
    ROOT/pins/NAME.json     entries that the job NAME will need again

Entries that were used longest ago go first when room is needed. Spared are those that a process holds, and those that
a paused job has pinned. Torch-free, so that a service can unpin.
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
"""A pin that is older counts no more: its job was given up."""
ABANDONED_SECONDS = 3600
"""No piece of work is written for so long."""


@dataclass(frozen=True)
class SharedCache:
    """The entries below `root`, together at most `max_bytes`."""

    root: Path
    max_bytes: int
    keep_for: str | None = None
    """The job whose pin names what is used here; None pins nothing."""

    @contextmanager
    def held(self, kind: str, key: str) -> Iterator[Path]:
        """The directory of an entry, made if need be, that nobody evicts in the meantime."""
        path = self.root / kind / key
        while (handle := self._locked(path)) is None:
            # It was evicted before the lock was had.
            continue
        try:
            os.utime(path)
            self._pin(f"{kind}/{key}")
            yield path
        finally:
            os.close(handle)

    def _locked(self, path: Path) -> int | None:
        """A handle that shares the lock of the directory; None where that has been evicted since it was made."""
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
        """The directory of an entry that :meth:`add` made, checked against its manifest; None if there is none."""
        path = self.root / kind / key
        if not path.is_dir():
            return None
        try:
            verify(path)
            os.utime(path)
        except (CheckpointCorrupt, FileNotFoundError):
            # Damaged, or evicted meanwhile.
            with suppress(FileNotFoundError):
                discard(path)
            return None
        return path

    @contextmanager
    def add(self, kind: str, key: str) -> Iterator[Path]:
        """Give a scratch directory that becomes the entry, whole, on leaving.

        Raises:
            DiskFull: when there is no space; nothing is added then.
        """
        with new_directory(self.root / kind / key) as scratch:
            yield scratch
        self.make_room(0, besides=f"{kind}/{key}")

    def make_room(self, needed: int, *, besides: str) -> bool:
        """Evict until `needed` bytes more than `besides` holds now fit; whether they do.

        Args:
            besides: `KIND/KEY` of the entry that grows; it is not evicted.
        """
        pinned = {*self._pinned(), besides}
        entries = {entry: _bytes_below(entry) for entry in self._entries()}
        total = sum(entries.values()) + needed
        for entry in sorted(entries, key=_last_used):
            if total <= self.max_bytes:
                break
            if entry.relative_to(self.root).as_posix() not in pinned and _evict(entry):
                total -= entries[entry]
        return total <= self.max_bytes

    def sweep(self) -> None:
        """Remove what killed processes left half-written; what is younger may be another's work."""
        for left in self.root.rglob(f"{SCRATCH_PREFIX}*"):
            if time.time() - _last_used(left) > ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)

    def unpin(self) -> None:
        """The job will not need its entries again."""
        if self.keep_for is not None:
            _pin_file(self.root, self.keep_for).unlink(missing_ok=True)

    def pinned_by(self) -> set[str]:
        """Names of the jobs that have pinned something, given up or not."""
        return {pin.stem for pin in (self.root / PINS).glob("*.json")}

    def _entries(self) -> list[Path]:
        return [entry for entry in self.root.glob("*/*") if entry.is_dir() and not entry.name.startswith(".")]

    def _pin(self, entry: str) -> None:
        if self.keep_for is None:
            return
        path = _pin_file(self.root, self.keep_for)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(sorted({*_read_pin(path), entry})))

    def _pinned(self) -> set[str]:
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
    """Remove an entry unless a process holds it."""
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
        # Another process was faster.
        return True
    finally:
        os.close(handle)
    return True


def _last_used(path: Path) -> float:
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
            # Evicted by another process meanwhile.
            continue
    return total
