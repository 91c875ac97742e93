"""Values that the API processes of one machine share, so that each of them can tell the totals of all.

Every process writes its own file, mapped into memory, and reads the files of the others. The kernel keeps what was
written, however a process ends. What ended processes have counted is folded into one further file by whoever notices
first, and their gauges end with them; so there are as many files as there are processes, and counters only grow.
"""

import errno
import fcntl
import json
import os
import struct
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol

import structlog
from prometheus_client.mmap_dict import MmapedDict

_log = structlog.get_logger(__name__)

Key = tuple[str, ...]
"""The name of a value, the labels of its series, and which part of the series it is."""

_RESERVED_BYTES: Final = 4 * 2**20
"""Disk space of the file of a process: where it is taken beforehand, a full disk does not end a process that writes."""
_MAX_KEYS: Final = 16_000
"""Keys of one process, which fit into its file."""
_FOLDED: Final = "ended.json"
_LOCK_SECONDS: Final = 2.0
_LOCK_POLL_SECONDS: Final = 0.005
_HINT: Final = "Each process shows its own requests alone: look at the directory `metrics` below POCL_HOME."


class ProcessValues(Protocol):
    """Where a process writes its values, and reads those of all processes."""

    def write(self, key: Key, value: float, *, is_gauge: bool = False) -> None:
        """Write a value of this process.

        Args:
            is_gauge: whether the value ends with the process; otherwise it stays in the totals.
        """

    def totals(self) -> dict[Key, float]:
        """The sum of each value over all processes."""


class PrivateValues:
    """The values of a process that has no directory to share."""

    def __init__(self) -> None:
        self._values: dict[Key, float] = {}

    def write(self, key: Key, value: float, *, is_gauge: bool = False) -> None:  # noqa: ARG002 - of the protocol
        """See :class:`ProcessValues`."""
        self._values[key] = value

    def totals(self) -> dict[Key, float]:
        """See :class:`ProcessValues`."""
        return dict(self._values)


class SharedValues:
    """The values of the processes that share a directory.

    Raises:
        OSError: the directory cannot be written, or the disk is full.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._lock_file = directory / "lock"
        self._path = directory / f"{os.getpid()}-{uuid.uuid4().hex}.db"
        # Under the lock, so that no other process finds the file before it is held.
        with self._locked(fcntl.LOCK_EX):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # Held for as long as this process lives: whoever can lock the file knows that it has ended.
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.posix_fallocate(self._descriptor, 0, _RESERVED_BYTES)
            except OSError:
                self._path.unlink()
                os.close(self._descriptor)
                raise
        self._values = MmapedDict(str(self._path))
        self._names: dict[Key, str] = {}
        self._fold_ended()

    def write(self, key: Key, value: float, *, is_gauge: bool = False) -> None:
        """See :class:`ProcessValues`."""
        name = self._names.get(key)
        if name is None:
            if len(self._names) >= _MAX_KEYS:
                return
            name = self._names[key] = json.dumps([is_gauge, *key])
        self._values.write_value(name, value, 0.0)

    def totals(self) -> dict[Key, float]:
        """See :class:`ProcessValues`. Those of this process alone where another one holds the files for seconds."""
        self._fold_ended()
        totals: dict[str, float]
        try:
            with self._locked(fcntl.LOCK_SH):
                folded, totals = self._read_folded()
                for path in self._directory.glob("*.db"):
                    if path.name not in folded:
                        _add(totals, _read(path))
        except OSError as error:
            _log.warning("metrics_not_shared", error=error.strerror, hint=_HINT)
            totals = _read(self._path)
        return {tuple(json.loads(name)[1:]): value for name, value in totals.items()}

    def close(self) -> None:
        """End the part of this process: its counts stay in the totals of the others."""
        self._values.close()
        os.close(self._descriptor)

    @contextmanager
    def _locked(self, mode: int) -> Iterator[None]:
        descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + _LOCK_SECONDS
            while not _try_lock(descriptor, mode):
                if time.monotonic() > deadline:
                    # Its holder was stopped or frozen.
                    raise TimeoutError(errno.ETIMEDOUT, "another process holds the lock of the metrics")
                time.sleep(_LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def _fold_ended(self) -> None:
        """Add the counts of ended processes to those of earlier ones, and remove their files."""
        with suppress(OSError), self._locked(fcntl.LOCK_EX):
            ended = [path for path in self._directory.glob("*.db") if path != self._path and _has_ended(path)]
            if not ended:
                return
            folded, totals = self._read_folded()
            for path in ended:
                if path.name not in folded:
                    _add(totals, {name: value for name, value in _read(path).items() if not json.loads(name)[0]})
            if len(totals) > _MAX_KEYS:
                # Years of changing routes: to begin again is what a counter may always do.
                totals = {}
            # The names of the files are written too: killed before it removes them, this process leaves them uncounted.
            content = json.dumps({"files": [path.name for path in ended], "totals": totals})
            scratch = self._directory / f"{_FOLDED}.new"
            scratch.write_text(content, encoding="utf-8")
            scratch.replace(self._directory / _FOLDED)
            for path in ended:
                path.unlink(missing_ok=True)

    def _read_folded(self) -> tuple[set[str], dict[str, float]]:
        """The files that are folded in already, and the counts of ended processes."""
        try:
            stored: dict[str, Any] = json.loads((self._directory / _FOLDED).read_bytes())
            return set(stored["files"]), dict(stored["totals"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # A machine that lost its power may leave half a file: the counters begin again.
            return set(), {}


def open_values(directory: Path) -> ProcessValues:
    """The values of the processes that share `directory`; those of this process alone where it cannot be used."""
    try:
        return SharedValues(directory)
    except OSError as error:
        _log.warning("metrics_not_shared", error=error.strerror, hint=_HINT)
        return PrivateValues()


def _has_ended(path: Path) -> bool:
    """Whether the process of a file has ended."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _try_lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path) -> dict[str, float]:
    try:
        return {name: value for name, value, _, _ in MmapedDict.read_all_values_from_file(str(path))}
    except (OSError, RuntimeError, ValueError, struct.error):
        # Half written when its machine lost power.
        return {}


def _add(totals: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value
