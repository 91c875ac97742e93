"""How an attempt ended, read from the engine's exit status, its last event and the stop request that it got."""

import signal
from dataclasses import dataclass, replace
from typing import Final

from domain.artifacts import ArtifactStoreRefused, ArtifactStoreUnavailable
from domain.jobs.states import ARTIFACT_STORE_UNAVAILABLE, AttemptOutcome, EndReason, StopRequest
from pocl.errors import RunStopped, is_disk_full
from pocl.events import RunEnded, RunFinished
from pocl.layout import ExitCode

_STOPPED: Final = RunStopped.code

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
    """What is known of an engine that has exited."""

    status: int
    """As `Popen.returncode`: negative for a signal."""
    end_event: RunFinished | RunEnded | None = None
    """The event with which it ended; null where it was killed before it could report one."""
    stop_request: StopRequest | None = None
    """Why the worker asked it to stop; null where it did not."""
    student_stored: bool = False
    """Whether the finished student is in the artifact store."""
    storage_error: EndReason | None = None
    """Why a file of the run could not be stored; null where all were."""
    oom_kills: int = 0
    """Processes of this control group that the kernel killed for want of memory while the engine ran."""


def storage_failure_reason(error: OSError) -> EndReason:
    """The end reason for an error of the file system or of the artifact store."""
    if isinstance(error, ArtifactStoreUnavailable):
        return ARTIFACT_STORE_UNAVAILABLE
    reason = DISK_FULL if is_disk_full(error) else STORAGE_FAILED
    if isinstance(error, ArtifactStoreRefused):
        return replace(reason, message=str(error), hint="Then retry the job.")
    return reason


def outcome_of_storage_failure(reason: EndReason) -> AttemptOutcome:
    """The outcome of an attempt whose files could not be stored or fetched: a store that is away costs no attempt."""
    if reason.code == ARTIFACT_STORE_UNAVAILABLE.code:
        return AttemptOutcome.released(reason)
    return AttemptOutcome.failed(reason)


def classify_exit(engine_exit: EngineExit) -> AttemptOutcome:
    """The outcome of the attempt. A failure that the engine reported stands, whatever stop request came meanwhile."""
    if engine_exit.status == ExitCode.DONE and isinstance(engine_exit.end_event, RunFinished):
        if engine_exit.student_stored:
            return AttemptOutcome.succeeded()
        return outcome_of_storage_failure(engine_exit.storage_error or STORAGE_FAILED)
    end = engine_exit.end_event
    if isinstance(end, RunEnded) and end.code != _STOPPED:
        return AttemptOutcome.failed(EndReason(end.code, end.message, end.fault, end.retryable, end.hint))
    if engine_exit.stop_request is not None:
        return engine_exit.stop_request.outcome
    return _classify_unrequested_exit(engine_exit)


def _classify_unrequested_exit(engine_exit: EngineExit) -> AttemptOutcome:
    if isinstance(engine_exit.end_event, RunEnded):
        return AttemptOutcome.crashed(STOPPED)
    if engine_exit.status == ExitCode.USAGE:
        return AttemptOutcome.failed(SPEC_REFUSED)
    if engine_exit.status == -signal.SIGKILL:
        return AttemptOutcome.crashed(OUT_OF_MEMORY if engine_exit.oom_kills else KILLED)
    if engine_exit.status < 0:
        message = f"The engine died by {_signal_name(-engine_exit.status)}."
        return AttemptOutcome.crashed(EndReason("engine_crashed", message, "system", True, NO_RESULT.hint))
    return AttemptOutcome.crashed(NO_RESULT)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
