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
    """Pin the specification in the directory of its run: a continued run keeps the choices of its first start.

    Args:
        spec: The specification as posted.
        chosen: `spec` with what the engine would choose on this machine.

    Returns:
        The specification that the directory was started with; at its first start `chosen`.

    Raises:
        WorkdirMismatch: when the directory was started with a different specification.
    """
    path = workdir / SPEC_FILE
    if not path.exists():
        pin_again(workdir, chosen)
        return chosen
    try:
        pinned = DistillationSpec.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise WorkdirMismatch("spec.json of the directory cannot be read by this version") from error
    if pinned.without_choices(spec) != spec:
        raise WorkdirMismatch
    return pinned


def pin_again(workdir: Path, spec: DistillationSpec) -> None:
    """Replace the pinned specification with `spec`, which has more choices of the engine, or a choice that memory did
    not allow made smaller.

    Raises:
        DiskFull: when there is no space; the directory keeps what was pinned before.
    """
    replace_file(workdir / SPEC_FILE, spec.model_dump_json(indent=1) + "\n")


class EventLog:
    """A sink that appends each event to `events.jsonl` as a whole line, and passes it on.

    A little space is reserved while the log is open, so that a run which a full disk ends can still say so.

    Raises:
        DiskFull: when a line does not fit; the log then ends with the line before.
    """

    def __init__(self, path: Path, sink: Sink) -> None:
        self._sink = sink
        self._reserve = path.with_name(_RESERVE_FILE)
        with translating_disk_full():
            _cut_torn_line(path)
            # The file is unbuffered: what could not be written must not be written again with the next line.
            self._out = path.open("ab", buffering=0)
            self._reserve_space()

    def __call__(self, event: Event) -> None:
        line = (to_line(event, datetime.now(UTC)) + "\n").encode()
        try:
            self._append(line)
        except DiskFull:
            if not isinstance(event, RunEnded):
                raise
            self._append_from_reserve(line)
        self._sink(event)

    def _reserve_space(self) -> None:
        # Where even the reserve does not fit the run cannot last, and its first checkpoint will fail.
        try:
            self._reserve.write_bytes(bytes(_RESERVE_BYTES))
        except OSError as error:
            if not is_disk_full(error):
                raise

    def _append(self, line: bytes) -> None:
        size_before = os.fstat(self._out.fileno()).st_size
        try:
            with translating_disk_full():
                write_all(self._out, line)
        except DiskFull:
            self._out.truncate(size_before)
            raise

    def _append_from_reserve(self, line: bytes) -> None:
        self._reserve.unlink(missing_ok=True)
        # Another process may have filled the freed space as well; the caller gets the event in any case.
        with suppress(DiskFull):
            self._append(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()
        self._reserve.unlink(missing_ok=True)


def _cut_torn_line(path: Path) -> None:
    """Cut off the torn line that a killed process may have left, so that the next event does not continue it."""
    if not path.exists():
        return
    content = path.read_bytes()
    size = content.rfind(b"\n") + 1
    if size < len(content):
        os.truncate(path, size)
