"""The directory of a run: one process at a time, its specification, and the log of its events.

spec.json  events.jsonl  ranking.jsonl  checkpoints/  best/  final/  result.json  report.html
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from pocl.errors import WorkdirInUse, WorkdirMismatch
from pocl.events import Event, Sink, to_line
from pocl.manifest import replace_file, sweep
from pocl.spec import DistillationSpec

SPEC_FILE = "spec.json"
EVENTS_FILE = "events.jsonl"


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold the directory for this process, and clear what killed processes left half-written.

    Raises:
        WorkdirInUse: when another process holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    handle = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirInUse from None
        sweep(workdir)
        sweep(workdir / "checkpoints")
        yield
    finally:
        os.close(handle)


def settle_spec(workdir: Path, spec: DistillationSpec, chosen: DistillationSpec) -> DistillationSpec:
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
    """A sink that appends to `events.jsonl`, whole lines only, and passes each event on."""

    def __init__(self, path: Path, onward: Sink) -> None:
        self._onward = onward
        _cut_torn_line(path)
        self._out = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        self._out.write(to_line(event, datetime.now(UTC)) + "\n")
        self._out.flush()
        self._onward(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()


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
