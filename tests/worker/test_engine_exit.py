"""Every way in which an engine can exit has one outcome."""

import errno
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.jobs.states import AttemptEnd, StopRequest
from pocl.events import RunEnded, RunFinished
from worker.engine_exit import EngineExit, classify_exit, storage_failure_reason

FINISHED = RunFinished(step=9)
FAILED = RunEnded(code="loss_diverged", message="m", fault="user", retryable=False, hint="h", step=3)
STOPPED = RunEnded(code="stopped", message="m", fault="system", retryable=True, hint="h", step=3)

engine_exits = st.builds(
    EngineExit,
    status=st.integers(-64, 255),
    end_event=st.sampled_from([None, FINISHED, FAILED, STOPPED]),
    stop_request=st.sampled_from([None, *StopRequest]),
    student_stored=st.booleans(),
    oom_kills=st.integers(0, 2),
)


@given(engine_exits)
def test_only_a_finished_and_stored_run_succeeds(engine_exit: EngineExit) -> None:
    whole = engine_exit.status == 0 and engine_exit.end_event == FINISHED and engine_exit.student_stored
    assert (classify_exit(engine_exit).end is AttemptEnd.SUCCEEDED) == whole


@given(engine_exits)
def test_every_outcome_has_a_code_and_a_sentence(engine_exit: EngineExit) -> None:
    reason = classify_exit(engine_exit).reason
    assert reason.code
    assert reason.message.endswith(".") or reason.message == "m"


@given(st.sampled_from([None, *StopRequest]), st.integers(-64, 255))
def test_reported_failure_stands_whatever_stop_request_came(stop_request: StopRequest | None, status: int) -> None:
    outcome = classify_exit(EngineExit(status, FAILED, stop_request))
    assert (outcome.end, outcome.reason.code) == (AttemptEnd.FAILED, "loss_diverged")


@pytest.mark.parametrize(
    ("engine_exit", "end", "code"),
    [
        (EngineExit(75, STOPPED, StopRequest.CANCEL), AttemptEnd.CANCELLED, "cancelled"),
        (EngineExit(75, STOPPED, StopRequest.PAUSE), AttemptEnd.RELEASED, "released"),
        (EngineExit(75, STOPPED, StopRequest.RELEASE), AttemptEnd.RELEASED, "released"),
        (EngineExit(-signal.SIGKILL, None, StopRequest.RELEASE), AttemptEnd.RELEASED, "released"),
        (EngineExit(-signal.SIGKILL, None, StopRequest.STALL), AttemptEnd.CRASHED, "stalled"),
        (EngineExit(75, STOPPED), AttemptEnd.CRASHED, "engine_stopped"),
        (EngineExit(2), AttemptEnd.FAILED, "spec_invalid"),
        (EngineExit(0), AttemptEnd.CRASHED, "engine_failure"),
        (EngineExit(1), AttemptEnd.CRASHED, "engine_failure"),
        (EngineExit(-signal.SIGKILL), AttemptEnd.CRASHED, "engine_killed"),
        (EngineExit(-signal.SIGKILL, oom_kills=1), AttemptEnd.CRASHED, "out_of_memory"),
        (EngineExit(-signal.SIGSEGV), AttemptEnd.CRASHED, "engine_crashed"),
        (EngineExit(-signal.SIGKILL, FINISHED, student_stored=True), AttemptEnd.CRASHED, "engine_killed"),
        (EngineExit(0, FINISHED), AttemptEnd.FAILED, "storage_failed"),
    ],
)
def test_each_exit_has_its_outcome(engine_exit: EngineExit, end: AttemptEnd, code: str) -> None:
    outcome = classify_exit(engine_exit)
    assert (outcome.end, outcome.reason.code) == (end, code)


def test_signal_that_killed_the_engine_is_named() -> None:
    assert "SIGSEGV" in classify_exit(EngineExit(-signal.SIGSEGV)).reason.message


def test_full_disk_and_unwritable_disk_have_different_reasons() -> None:
    assert storage_failure_reason(OSError(errno.ENOSPC, "full")).code == "disk_full"
    assert storage_failure_reason(PermissionError(errno.EACCES, "denied")).code == "storage_failed"
