"""Every way in which an engine can end has one outcome."""

import errno
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.jobs.states import AttemptEnd, StopRequest
from pocl.events import RunEnded, RunFinished
from worker.engine_exit import EngineExit, classify_exit, count_oom_kills, storage_failure_reason

FINISHED = RunFinished(step=9)
FAILED = RunEnded(code="loss_diverged", message="m", fault="user", retryable=False, hint="h", step=3)
STOPPED = RunEnded(code="stopped", message="m", fault="system", retryable=True, hint="h", step=3)

endings = st.builds(
    EngineExit,
    status=st.integers(-64, 255),
    last=st.sampled_from([None, FINISHED, FAILED, STOPPED]),
    stop_request=st.sampled_from([None, *StopRequest]),
    stored=st.booleans(),
    oom_kills=st.integers(0, 2),
)


@given(endings)
def test_only_a_whole_run_succeeds(ending: EngineExit) -> None:
    whole = ending.status == 0 and ending.last == FINISHED and ending.stored
    assert (classify_exit(ending).end is AttemptEnd.SUCCEEDED) == whole


@given(endings)
def test_an_outcome_always_says_why_in_a_sentence(ending: EngineExit) -> None:
    reason = classify_exit(ending).reason
    assert reason.code
    assert reason.message.endswith(".") or reason.message == "m"


@given(st.sampled_from([None, *StopRequest]), st.integers(-64, 255))
def test_a_typed_failure_stands_whatever_stop_request_came(stop_request: StopRequest | None, status: int) -> None:
    outcome = classify_exit(EngineExit(status, FAILED, stop_request))
    assert (outcome.end, outcome.reason.code) == (AttemptEnd.FAILED, "loss_diverged")


@pytest.mark.parametrize(
    ("ending", "end", "code"),
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
        (EngineExit(-signal.SIGKILL, FINISHED, stored=True), AttemptEnd.CRASHED, "engine_killed"),
        (EngineExit(0, FINISHED), AttemptEnd.FAILED, "storage_failed"),
    ],
)
def test_the_table_of_ends(ending: EngineExit, end: AttemptEnd, code: str) -> None:
    outcome = classify_exit(ending)
    assert (outcome.end, outcome.reason.code) == (end, code)


def test_the_signal_is_named() -> None:
    assert "SIGSEGV" in classify_exit(EngineExit(-signal.SIGSEGV)).reason.message


def test_kills_for_want_of_memory_are_read_from_the_control_group(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert count_oom_kills(tmp_path / "memory.events") == 2
    assert count_oom_kills(tmp_path / "none") == 0
    (tmp_path / "memory.events").write_text("nonsense\n")
    assert count_oom_kills(tmp_path / "memory.events") == 0


def test_a_full_disk_is_told_from_a_broken_one() -> None:
    assert storage_failure_reason(OSError(errno.ENOSPC, "full")).code == "disk_full"
    assert storage_failure_reason(PermissionError(errno.EACCES, "denied")).code == "storage_failed"
