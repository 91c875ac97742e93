"""How an attempt ended, read from the engine's exit status, its last event and the stop request that it got."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from domain.jobs.states import AttemptOutcome, EndReason, StopRequest
from pocl.errors import is_disk_full
from pocl.events import RunEnded, RunFinished
from pocl.layout import ExitCode

_STOPPED: Final = "stopped"

NO_RESULT: Final = EndReason(
    "engine_failure", "The engine ended without a result.", "system", True, "See the log of the attempt."
)
SPEC_REFUSED: Final = EndReason(
    "spec_invalid", "The engine refused the specification.", "system", False, "See the log of the attempt."
)
OUT_OF_MEMORY: Final = EndReason(
    "out_of_memory",
    "The system ended the engine for want of memory.",
    "capacity",
    True,
    "Use a smaller student, a shorter data.max_length, or a machine with more memory.",
)
KILLED: Final = EndReason(
    "engine_killed",
    "The engine was killed from outside.",
    "capacity",
    True,
    "Most often the machine had no memory left: use a smaller student or a machine with more memory.",
)
STOPPED: Final = EndReason(
    "engine_stopped", "Something other than the service asked the engine to stop.", "system", True, "Retry the job."
)
DISK_FULL: Final = EndReason(
    "disk_full",
    "There is no space left for the files of the job.",
    "capacity",
    True,
    "Free disk space, then retry the job.",
)
STORAGE_FAILED: Final = EndReason(
    "storage_failed", "Files of the job could not be stored.", "system", True, "Check the disk of the worker."
)
WORKER_FAILED: Final = EndReason(
    "worker_failure", "The worker failed in a way that was not foreseen.", "system", True, "See the worker's log."
)


@dataclass(frozen=True)
class EngineExit:
    """What is known of an engine that is gone."""

    status: int
    """As `Popen.returncode`: negative for a signal."""
    last: RunFinished | RunEnded | None = None
    """Its last word."""
    stop_request: StopRequest | None = None
    """Why the worker asked it to stop; null where it did not."""
    stored: bool = False
    """Whether the finished student is in the artifact store."""
    trouble: EndReason | None = None
    """What kept a file out of the store."""
    oom_kills: int = 0
    """Processes of this machine's group that the system ended for want of memory meanwhile."""


def storage_failure_reason(error: OSError) -> EndReason:
    """The reason that an error of the file system stands for."""
    return DISK_FULL if is_disk_full(error) else STORAGE_FAILED


def classify_exit(ending: EngineExit) -> AttemptOutcome:
    """The outcome for the rows. A typed failure stands, whatever stop request came meanwhile."""
    if ending.status == ExitCode.DONE and isinstance(ending.last, RunFinished):
        return AttemptOutcome.succeeded() if ending.stored else AttemptOutcome.failed(ending.trouble or STORAGE_FAILED)
    if isinstance(ending.last, RunEnded) and ending.last.code != _STOPPED:
        last = ending.last
        return AttemptOutcome.failed(EndReason(last.code, last.message, last.fault, last.retryable, last.hint))
    return _classify_unrequested_exit(ending) if ending.stop_request is None else ending.stop_request.outcome


def _classify_unrequested_exit(ending: EngineExit) -> AttemptOutcome:
    if isinstance(ending.last, RunEnded):
        return AttemptOutcome.crashed(STOPPED)
    if ending.status == ExitCode.USAGE:
        return AttemptOutcome.failed(SPEC_REFUSED)
    if ending.status == -signal.SIGKILL:
        return AttemptOutcome.crashed(OUT_OF_MEMORY if ending.oom_kills else KILLED)
    if ending.status < 0:
        return AttemptOutcome.crashed(
            EndReason("engine_crashed", f"The engine died by {_name(-ending.status)}.", "system", True, NO_RESULT.hint)
        )
    return AttemptOutcome.crashed(NO_RESULT)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def count_oom_kills(events: Path = Path("/sys/fs/cgroup/memory.events")) -> int:
    """How many processes of this control group the kernel ended for want of memory so far; 0 where unknown."""
    try:
        counts = dict(line.split() for line in events.read_text().splitlines())
        return int(counts.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0
