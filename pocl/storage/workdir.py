"""The directory of a run: one process at a time, its specification, and the log of its events."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from pocl.errors import DiskFull, WorkdirInUse, WorkdirMismatch, is_disk_full
from pocl.events import Event, RunEnded, Sink, to_line
from pocl.layout import LOCK_FILE, SPEC_FILE
from pocl.spec import DistillationSpec
from pocl.storage.manifest import replace_file, sweep, translating_disk_full, write_all

_RESERVE_FILE = ".reserve"
_RESERVE_BYTES = 64 << 10


@contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Hold the directory for this process, and clear what killed processes left half-written.

    Raises:
        WorkdirInUse: when another process holds it.
        DiskFull: when there is no space for the directory.
    """
    with translating_disk_full():
        workdir.mkdir(parents=True, exist_ok=True)
        handle = os.open(workdir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirInUse from None
        sweep(workdir)
        yield
    finally:
        os.close(handle)


def pin_spec(workdir: Path, spec: DistillationSpec, chosen: DistillationSpec) -> DistillationSpec:
    """The specification to run: what the directory was started with, or else `chosen`, which is then written.

    `chosen` is `spec` with what the engine chose for this machine. A continued run keeps the first choice.

    Raises:
        WorkdirMismatch: when the directory was started with a different specification.
    """
    path = workdir / SPEC_FILE
    if not path.exists():
        replace_file(path, chosen.model_dump_json(indent=1) + "\n")
        return chosen
    try:
        kept = DistillationSpec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise WorkdirMismatch("spec.json of the directory cannot be read by this version") from error
    if _as_posted(kept, spec) != spec:
        raise WorkdirMismatch
    return kept


class EventLog:
    """A sink that appends to `events.jsonl`, whole lines only, and passes each event on.

    A little space is held back while the log is open, so that a run which a full disk ends can still say so.

    Raises:
        DiskFull: when a line does not fit; the log then ends with the line before.
    """

    def __init__(self, path: Path, onward: Sink) -> None:
        self._onward = onward
        self._reserve = path.with_name(_RESERVE_FILE)
        with translating_disk_full():
            _cut_torn_line(path)
            # Unbuffered: what could not be written must not be tried again with the next line.
            self._out = path.open("ab", buffering=0)
            self._hold_back()

    def __call__(self, event: Event) -> None:
        line = (to_line(event, datetime.now(UTC)) + "\n").encode()
        try:
            self._append(line)
        except DiskFull:
            if not isinstance(event, RunEnded):
                raise
            self._append_from_reserve(line)
        self._onward(event)

    def _hold_back(self) -> None:
        # Where even this finds no room the run cannot last, and its first checkpoint will say so.
        try:
            self._reserve.write_bytes(bytes(_RESERVE_BYTES))
        except OSError as error:
            if not is_disk_full(error):
                raise

    def _append(self, line: bytes) -> None:
        whole = os.fstat(self._out.fileno()).st_size
        try:
            with translating_disk_full():
                write_all(self._out, line)
        except DiskFull:
            self._out.truncate(whole)
            raise

    def _append_from_reserve(self, line: bytes) -> None:
        self._reserve.unlink(missing_ok=True)
        # Whoever filled the disk may have taken that too; the caller is told in any case.
        with suppress(DiskFull):
            self._append(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()
        self._reserve.unlink(missing_ok=True)


def _as_posted(kept: DistillationSpec, spec: DistillationSpec) -> DistillationSpec:
    """`kept` with the engine's choices put back to null where `spec` left them to the engine."""
    training, resources = kept.training, kept.resources
    if spec.training.micro_batch_size is None:
        training = training.model_copy(update={"micro_batch_size": None})
    if spec.resources.threads is None:
        resources = resources.model_copy(update={"threads": None})
    return kept.model_copy(update={"training": training, "resources": resources})


def _cut_torn_line(path: Path) -> None:
    """A killed process may have left half a line: the next event must not be glued to it."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
