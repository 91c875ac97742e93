"""Runs on a disk of a few megabytes that fills at a chosen moment, and is freed again.

Started with a directory, in a mount namespace of its own; prints what the cases came to as one JSON object.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.faults.outcome import RunOutcome, manifest_errors, read_events, scratch_paths
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
Space = Callable[[Event], int | None]
"""How many bytes to leave on the disk once an event comes; None leaves the disk as it is."""


@dataclass
class Case:
    """What a full disk did to a run."""

    code: str | None = None
    where: str = ""
    """The lines of the engine through which the error came."""
    told: str | None = None
    """The code of the last event that the caller heard."""
    written: str | None = None
    """The type of the last event in the log."""
    whole_step: int | None = None
    """Step of the newest whole checkpoint."""
    damaged: tuple[str, ...] = ()
    litter: tuple[str, ...] = ()


@dataclass
class Log:
    """What a full disk did to a log of events."""

    refused: bool = False
    whole: bool = False
    """Whether every line of the file can be read."""
    ended: bool = False
    """Whether its last line is the end of the run."""
    heard: bool = False
    """Whether the caller heard the end."""


def main() -> int:
    disk = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", disk], check=True)
    spec = write_variant(disk, "restart")
    run(read_spec(spec), disk / "baseline", _unheard)
    moments: dict[str, Space] = {
        "ranking": lambda event: 0 if isinstance(event, Progressed) and event.phase == "ranking" else None,
        # Saved before the fifth step; the checkpoint before it is that of step 2.
        "weights": lambda event: 2 * _PAGE if _is_step(event, 4) else None,
        "optimizer": lambda event: _pages_of_weights(disk / "run") if _is_step(event, 4) else None,
        "exporting": lambda event: _PAGE if isinstance(event, PhaseChanged) and event.phase == "exporting" else None,
    }
    # One run, stopped by a full disk four times.
    cases = {name: asdict(_case(spec, disk / "run", space)) for name, space in moments.items()}
    run(read_spec(spec), disk / "run", _unheard)
    differences = RunOutcome.read(disk / "run").differences(RunOutcome.read(disk / "baseline"))
    json.dump({**cases, "differences": differences, "log": asdict(_log(disk))}, sys.stdout)
    return 0


def _case(spec: Path, workdir: Path, space: Space) -> Case:
    case, events = Case(), list[Event]()
    ballast = workdir.with_name("ballast")

    def sink(event: Event) -> None:
        events.append(event)
        left = space(event)
        if left is not None and not ballast.exists():
            _fill(ballast, left)

    try:
        run(read_spec(spec), workdir, sink)
    except PoclError as error:
        case.code, case.where = error.code, _lines_of(error)
    case.told = next((event.code for event in events[-1:] if isinstance(event, RunEnded)), None)
    case.written = read_events(workdir)[-1]["type"]
    restored, _ = checkpoint.find_resume_point(workdir / CHECKPOINTS_DIR)
    case.whole_step = None if restored is None else restored.state.step
    case.damaged, case.litter = tuple(manifest_errors(workdir)), tuple(scratch_paths(workdir))
    ballast.unlink(missing_ok=True)
    return case


def _log(disk: Path) -> Log:
    heard: list[Event] = []
    path, ballast, found = disk / EVENTS_FILE, disk / "ballast", Log()
    with EventLog(path, heard.append) as log:
        _fill(ballast, 0)
        try:
            for number in range(1000):
                log(Warned(code="line", message=str(number)))
        except DiskFull:
            found.refused = True
        found.whole = len(path.read_bytes().splitlines()) == len(heard) == len(read_events(disk))
        log(RunEnded(code="disk_full", message="full", fault="capacity", retryable=True, hint="free it", step=0))
    found.ended = read_events(disk)[-1]["type"] == "run_ended"
    found.heard = isinstance(heard[-1], RunEnded)
    ballast.unlink()
    return found


def _unheard(_: Event) -> None: ...


def _is_step(event: Event, step: int) -> bool:
    return isinstance(event, StepLogged) and event.step == step


def _pages_of_weights(workdir: Path) -> int:
    """Bytes that a checkpoint takes but for its training state, and one page: too little for the optimiser's."""
    directory = workdir / checkpoint_dir(2)
    files = [path for path in directory.iterdir() if path.is_file() and path.name != "manifest.json"]
    return sum(-(-path.stat().st_size // _PAGE) * _PAGE for path in files) + _PAGE


def _fill(ballast: Path, left: int) -> None:
    """Write until `left` bytes are free."""
    disk = os.statvfs(ballast.parent)
    ballast.write_bytes(bytes(disk.f_bavail * disk.f_frsize - left))


def _lines_of(error: BaseException) -> str:
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        lines += [str(frame.line) for frame in traceback.extract_tb(cause.__traceback__) if "/pocl/" in frame.filename]
        cause = cause.__cause__
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
