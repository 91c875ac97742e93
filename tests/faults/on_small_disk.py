"""Runs on a disk of a few megabytes that fills at a chosen event, and is freed again.

A program to be started with a directory, in a mount namespace of its own. It prints the results as one JSON object.
"""

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.faults.outcome import RunOutcome, manifest_errors, read_events, scratch_paths
from bench.faults.small_disk import fill, mount
from bench.faults.small_runs import write_variant
from pocl.__main__ import read_spec
from pocl.errors import DiskFull, PoclError
from pocl.events import Event, PhaseChanged, Progressed, RunEnded, StepLogged, Warned
from pocl.layout import (
    CHECKPOINTS_DIR,
    EVENTS_FILE,
    checkpoint_dir,
)
from pocl.run import run
from pocl.storage.workdir import EventLog
from pocl.train import checkpoint

MEGABYTES = 8
_PAGE = 4096
FreeBytes = Callable[[Event], int | None]
"""How many bytes to leave free once an event comes; null leaves the disk as it is."""


@dataclass
class RunResult:
    """What a full disk did to a run."""

    code: str | None = None
    where: str = ""
    """The source lines of the engine in the traceback of the error."""
    reported_code: str | None = None
    """The code of the last event that the caller got."""
    last_logged: str | None = None
    """The type of the last event in the log."""
    intact_step: int | None = None
    """The step of the newest intact checkpoint."""
    manifest_errors: tuple[str, ...] = ()
    scratch_paths: tuple[str, ...] = ()


@dataclass
class LogResult:
    """What a full disk did to a log of events."""

    refused: bool = False
    """Whether an event was refused with `DiskFull`."""
    complete: bool = False
    """Whether every line of the file can be parsed."""
    ended: bool = False
    """Whether the last line is the end of the run."""
    reported: bool = False
    """Whether the caller got the end of the run."""


def main() -> int:
    disk = Path(sys.argv[1])
    mount(disk, MEGABYTES)
    spec = write_variant(disk, "restart")
    run(read_spec(spec), disk / "baseline", _ignore)
    cases: dict[str, FreeBytes] = {
        "ranking": lambda event: 0 if isinstance(event, Progressed) and event.phase == "ranking" else None,
        # Saved before the fifth step; the checkpoint before it is that of step 2.
        "weights": lambda event: 2 * _PAGE if _is_step(event, 4) else None,
        "optimizer": lambda event: _pages_of_weights(disk / "run") if _is_step(event, 4) else None,
        "exporting": lambda event: _PAGE if isinstance(event, PhaseChanged) and event.phase == "exporting" else None,
    }
    # One run, stopped by a full disk four times.
    results = {name: asdict(_run_on_full_disk(spec, disk / "run", free_bytes)) for name, free_bytes in cases.items()}
    run(read_spec(spec), disk / "run", _ignore)
    differences = RunOutcome.read(disk / "run").differences(RunOutcome.read(disk / "baseline"))
    json.dump({**results, "differences": differences, "log": asdict(_fill_log(disk))}, sys.stdout)
    return 0


def _run_on_full_disk(spec: Path, workdir: Path, free_bytes: FreeBytes) -> RunResult:
    result, events = RunResult(), list[Event]()
    ballast = workdir.with_name("ballast")

    def sink(event: Event) -> None:
        events.append(event)
        free = free_bytes(event)
        if free is not None and not ballast.exists():
            fill(ballast, free)

    try:
        run(read_spec(spec), workdir, sink)
    except PoclError as error:
        result.code, result.where = error.code, _source_lines(error)
    result.reported_code = next((event.code for event in events[-1:] if isinstance(event, RunEnded)), None)
    result.last_logged = read_events(workdir)[-1]["type"]
    restored, _ = checkpoint.find_resume_point(workdir / CHECKPOINTS_DIR)
    result.intact_step = None if restored is None else restored.state.step
    result.manifest_errors, result.scratch_paths = tuple(manifest_errors(workdir)), tuple(scratch_paths(workdir))
    ballast.unlink(missing_ok=True)
    return result


def _fill_log(disk: Path) -> LogResult:
    reported: list[Event] = []
    path, ballast, result = disk / EVENTS_FILE, disk / "ballast", LogResult()
    with EventLog(path, reported.append) as log:
        fill(ballast, 0)
        try:
            for number in range(1000):
                log(Warned(code="line", message=str(number)))
        except DiskFull:
            result.refused = True
        result.complete = len(path.read_bytes().splitlines()) == len(reported) == len(read_events(disk))
        log(RunEnded(code="disk_full", message="full", fault="capacity", retryable=True, hint="free it", step=0))
    result.ended = read_events(disk)[-1]["type"] == "run_ended"
    result.reported = isinstance(reported[-1], RunEnded)
    ballast.unlink()
    return result


def _ignore(_: Event) -> None: ...


def _is_step(event: Event, step: int) -> bool:
    return isinstance(event, StepLogged) and event.step == step


def _pages_of_weights(workdir: Path) -> int:
    """Bytes that a checkpoint takes but for its training state, and one page: too little for the optimiser's."""
    directory = workdir / checkpoint_dir(2)
    files = [path for path in directory.iterdir() if path.is_file() and path.name != "manifest.json"]
    return sum(-(-path.stat().st_size // _PAGE) * _PAGE for path in files) + _PAGE


def _source_lines(error: BaseException) -> str:
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        lines += [str(frame.line) for frame in traceback.extract_tb(cause.__traceback__) if "/pocl/" in frame.filename]
        cause = cause.__cause__
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
