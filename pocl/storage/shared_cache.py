"""The cache that runs share: a directory of entries, bounded in size, for any number of processes.

    ROOT/KIND/KEY/...       an entry: whole, never changed, with a manifest; KEY follows from all that it depends on
    ROOT/holders/ID/        what one holder holds, has reserved, has claimed and is writing
    ROOT/pins/JOB.txt       entries that JOB will need again, one a line
    ROOT/lock               is locked while entries are counted, evicted, added or held

The entries and the reservations of all holders together never exceed the bound. The least recently used entries (LRU)
are evicted when room is needed, but for those that a process holds and those that a job has pinned, for instance while
it is paused. The directory of a holder is locked for as long as its process lives: what it holds, has reserved or has
half written ends with the process, however that ends. This module is free of torch, so that a service can unpin.
"""

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocl.errors import CheckpointCorrupt, DiskFull
from pocl.storage.manifest import SCRATCH_PREFIX, seal_directory, translating_disk_full, verify

PINS = "pins"
HOLDERS = "holders"
PINNED_SECONDS = 30 * 24 * 3600
"""The time to live of a pin: the job of an older one was given up."""
ABANDONED_SECONDS = 3600
"""The age beyond which a scratch directory beside entries was left by a killed process: none is written for so long."""
ENTRY_OVERHEAD_BYTES = 1024
"""At most so many bytes does the manifest of an entry of one or two files take."""
_LOCK = "lock"
_HELD, _STATE = "held.txt", "state.json"


@dataclass(frozen=True)
class SharedCache:
    """A bounded cache: the entries below `root` and what is reserved for more have together at most `max_bytes`.

    Every method may raise OSError, for instance where the disk has no inode or the process no file descriptor left;
    whoever can do without the cache goes on without it.
    """

    root: Path
    max_bytes: int
    pinning_job: str | None = None
    """The job that pins the entries that are used here; None pins nothing."""

    @contextmanager
    def holder(self) -> Iterator["CacheHolder"]:
        """A new holder, which holds and reserves nothing once the block ends or the process dies."""
        directory = self.root / HOLDERS / uuid.uuid4().hex
        with self.locked():
            directory.mkdir(parents=True)
            # Locked before anyone else can look at it: an unlocked directory is that of a dead process.
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield CacheHolder(self, directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(handle)

    @contextmanager
    def find(self, kind: str, key: str) -> Iterator[Path | None]:
        """The directory of a whole entry, which is not evicted while the block runs; None if there is none.

        A damaged entry is removed.
        """
        with self.holder() as holder:
            found = key in holder.hold(kind, [key])
            yield self.path(kind, key) if found and holder.verify(kind, key) is None else None

    @contextmanager
    def add(self, kind: str, key: str, size_bytes: int) -> Iterator[Path]:
        """Give a scratch directory for files of at most `size_bytes`, which becomes the entry when the block ends.

        Raises:
            DiskFull: when there is no space, on the disk or within the bound; nothing is added then.
        """
        with self.holder() as holder:
            if not holder.reserve(size_bytes + ENTRY_OVERHEAD_BYTES):
                raise DiskFull("the entry does not fit within the bound of the cache")
            with holder.add(kind, key) as scratch:
                yield scratch

    def keys(self, kind: str) -> list[str]:
        """The keys of all entries of a kind, in order; any of them may be evicted at any time."""
        return sorted(path.name for path in _directories(self.root / kind))

    def path(self, kind: str, key: str) -> Path:
        """Where an entry is, or would be."""
        return self.root / kind / key

    def sweep(self) -> None:
        """Remove what killed processes left: holders, scratch directories beside entries, expired pins, empty kinds."""
        with self.locked():
            _live_uses(self.root / HOLDERS)
            now = time.time()
            for kind in self._kinds():
                for scratch in _directories(kind, hidden=True):
                    if scratch.name.startswith(SCRATCH_PREFIX) and now - _last_used(scratch) > ABANDONED_SECONDS:
                        shutil.rmtree(scratch, ignore_errors=True)
                with suppress(OSError):
                    # Fails unless it is empty.
                    kind.rmdir()
            for pin in _files(self.root / PINS):
                if now - _last_used(pin) > PINNED_SECONDS:
                    pin.unlink(missing_ok=True)

    def remove_unused(self, seconds: float) -> int:
        """Remove entries that nobody has used for so long, but for those that a process holds or a job has pinned.

        Returns:
            how many were removed.
        """
        limit = time.time() - seconds
        if not any(_last_used(entry) < limit for kind in self._kinds() for entry in _directories(kind)):
            # Without the lock, which other processes need while they work.
            return 0
        removed = 0
        with self.holder() as holder, self.locked():
            spared = self._pinned_entries().union(*(use.held for use in _live_uses(self.root / HOLDERS)))
            for entry in [entry for kind in self._kinds() for entry in _directories(kind)]:
                if _last_used(entry) < limit and entry.relative_to(self.root).as_posix() not in spared:
                    holder.remove_entry(entry)
                    removed += 1
        return removed

    def unpin(self) -> None:
        """Drop the pin of the job, which will not need its entries again."""
        if self.pinning_job is not None:
            self.pin_file(self.pinning_job).unlink(missing_ok=True)

    def pinning_jobs(self) -> set[str]:
        """The jobs that have a pin, expired or not."""
        return {pin.stem for pin in _files(self.root / PINS) if pin.suffix == ".txt"}

    def pin_file(self, job: str) -> Path:
        """Where the pin of a job is."""
        return self.root / PINS / f"{job}.txt"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude all other holders, of this process and of others, while the block runs."""
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def fits(self, needed: int, evict: Callable[[Path], None]) -> bool:
        """Evict entries until `needed` bytes fit; to be called under the lock. Evicts nothing if they cannot fit."""
        entries = {entry: _bytes_in(entry) for kind in self._kinds() for entry in _directories(kind)}
        uses = _live_uses(self.root / HOLDERS)
        excess = sum(entries.values()) + sum(use.reserved for use in uses) + needed - self.max_bytes
        if excess <= 0:
            return True
        spared = self._pinned_entries().union(*(use.held for use in uses))
        evictable = [entry for entry in entries if entry.relative_to(self.root).as_posix() not in spared]
        if sum(entries[entry] for entry in evictable) < excess:
            return False
        for entry in sorted(evictable, key=_last_used):
            if excess > 0:
                evict(entry)
                excess -= entries[entry]
        return True

    def _kinds(self) -> list[Path]:
        return [kind for kind in _directories(self.root) if kind.name not in (PINS, HOLDERS)]

    def _pinned_entries(self) -> set[str]:
        now = time.time()
        pins = [pin for pin in _files(self.root / PINS) if now - _last_used(pin) < PINNED_SECONDS]
        return {entry for pin in pins for entry in _read_lines(pin)}


class CacheHolder:
    """What one user of the cache holds: entries that are not evicted, reserved bytes, claimed work, scratch.

    Its methods may be called from several threads.
    """

    def __init__(self, cache: SharedCache, directory: Path) -> None:
        """Made by :meth:`SharedCache.holder`."""
        self._cache = cache
        self._directory = directory
        self._held: set[str] = set()
        self._reserved = 0
        self._claimed: set[str] = set()

    def hold(self, kind: str, keys: Collection[str]) -> set[str]:
        """Hold the entries that exist of these, and give their keys: they are used now, pinned, and not evicted."""
        with self._cache.locked():
            found = {key for key in keys if self._cache.path(kind, key).is_dir()}
            for key in found:
                os.utime(self._cache.path(kind, key))
            self._keep(kind, found)
        return found

    def verify(self, kind: str, key: str) -> str | None:
        """Verify a held entry: None where it is whole; else what is wrong with it, and it is removed."""
        try:
            verify(self._cache.path(kind, key))
        except CheckpointCorrupt as error:
            self.discard(kind, key)
            return str(error)
        return None

    def discard(self, kind: str, key: str) -> None:
        """Remove an entry, whoever holds it: a memory-mapped file stays readable until it is unmapped."""
        with self._cache.locked():
            self.remove_entry(self._cache.path(kind, key))

    def reserve(self, size_bytes: int) -> bool:
        """Reserve room for entries, evicting others; whether there is room."""
        with self._cache.locked():
            if not self._cache.fits(size_bytes, self.remove_entry):
                return False
            self._reserved += size_bytes
            self._write_state()
        return True

    def release_reservation(self) -> None:
        """Give back what is reserved and was not needed."""
        with self._cache.locked():
            self._reserved = 0
            self._write_state()

    def claim(self, names: Sequence[str]) -> set[str]:
        """Claim pieces of work (single flight): give the names that no other live holder has claimed."""
        with self._cache.locked():
            others = set().union(*(use.claimed for use in _live_uses(self._cache.root / HOLDERS, self._directory)))
            free = set(names) - others
            self._claimed |= free
            self._write_state()
        return free

    def drop_claims(self) -> None:
        """Let others claim what this holder had claimed."""
        with self._cache.locked():
            self._claimed.clear()
            self._write_state()

    @contextmanager
    def add(self, kind: str, key: str) -> Iterator[Path]:
        """Give a scratch directory, which becomes an entry when the block ends; room for it was reserved before.

        The entry is held. If another has added it meanwhile, that one stays.

        Raises:
            DiskFull: when there is no space; nothing is added then.
        """
        scratch = self._directory / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}"
        try:
            with translating_disk_full():
                scratch.mkdir()
                yield scratch
                seal_directory(scratch)
                self._commit(scratch, kind, key)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _commit(self, scratch: Path, kind: str, key: str) -> None:
        target = self._cache.path(kind, key)
        with self._cache.locked():
            # Of the reservation, only what this entry turned out to take is used up.
            size = _bytes_in(scratch)
            excess = size - self._reserved
            if excess > 0 and not self._cache.fits(excess, self.remove_entry):
                raise DiskFull("the entry does not fit within the bound of the cache")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.is_dir():
                scratch.rename(target)
                self._reserved = max(0, self._reserved - size)
                self._write_state()
            self._keep(kind, {key})

    def _keep(self, kind: str, keys: Collection[str]) -> None:
        """Record that entries are held, and pin them."""
        new = sorted({f"{kind}/{key}" for key in keys} - self._held)
        _append_lines(self._directory / _HELD, new)
        self._held |= set(new)
        if self._cache.pinning_job is not None and keys:
            pin = self._cache.pin_file(self._cache.pinning_job)
            pin.parent.mkdir(exist_ok=True)
            pinned = _read_lines(pin) if new else set()
            _append_lines(pin, [entry for entry in new if entry not in pinned])
            os.utime(pin)

    def remove_entry(self, entry: Path) -> None:
        """Remove an entry atomically, under the lock: it moves into the directory of the holder, and is removed with
        that at last.
        """
        doomed = self._directory / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):
            entry.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _write_state(self) -> None:
        state = {"reserved": self._reserved, "claimed": sorted(self._claimed)}
        with translating_disk_full():
            (self._directory / _STATE).write_text(json.dumps(state), encoding="utf-8")


@dataclass(frozen=True)
class _Use:
    """What a live holder has said about itself."""

    held: frozenset[str]
    reserved: int
    claimed: frozenset[str]


def _live_uses(holders: Path, besides: Path | None = None) -> list[_Use]:
    """What the holders of live processes use; directories of dead ones are removed."""
    uses = []
    for directory in _directories(holders):
        if directory == besides:
            continue
        with suppress(FileNotFoundError):
            if _is_abandoned(directory):
                shutil.rmtree(directory, ignore_errors=True)
            else:
                uses.append(_read_use(directory))
    return uses


def _is_abandoned(directory: Path) -> bool:
    """Whether the process that had locked a directory is dead."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _read_use(directory: Path) -> _Use:
    state: dict[str, Any] = {}
    with suppress(FileNotFoundError, ValueError):
        # Writes happen under the lock, so a torn file is that of a process that has died meanwhile.
        state = json.loads((directory / _STATE).read_bytes())
    claimed = frozenset(state.get("claimed", ()))
    return _Use(frozenset(_read_lines(directory / _HELD)), int(state.get("reserved", 0)), claimed)


def _directories(parent: Path, *, hidden: bool = False) -> list[Path]:
    """The directories in `parent` whose names are hidden, or are not; none where it is gone."""
    try:
        with os.scandir(parent) as found:
            return [Path(item.path) for item in found if item.name.startswith(".") == hidden and item.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as found:
            return [Path(item.path) for item in found if item.is_file()]
    except FileNotFoundError:
        return []


def _append_lines(path: Path, lines: Sequence[str]) -> None:
    if lines:
        with translating_disk_full(), path.open("a", encoding="utf-8") as out:
            out.write("".join(f"{line}\n" for line in lines))


def _read_lines(path: Path) -> set[str]:
    """The lines of a file; none where it cannot be read."""
    try:
        return set(path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return set()


def _last_used(path: Path) -> float:
    """The modification time, which every use sets; 0 for what is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _bytes_in(directory: Path) -> int:
    """The bytes of all files below a directory that may be removed meanwhile."""
    total = 0
    try:
        with os.scandir(directory) as found:
            for item in found:
                total += _bytes_in(Path(item.path)) if item.is_dir(follow_symlinks=False) else _size_of(item)
    except FileNotFoundError:
        return total
    return total


def _size_of(item: os.DirEntry[str]) -> int:
    try:
        return item.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
