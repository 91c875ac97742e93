"""A limited process answers, or is killed at its limits; nothing of it outlives its parent."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocl.limited_process import (
    LimitedProcess,
    ProcessAnswerTooLarge,
    ProcessCrashed,
    ProcessFailed,
    ProcessOutOfMemory,
    ProcessOutOfTime,
)
from tests.support.waiting import eventually

pytestmark = pytest.mark.system

ANSWERS = "tests.support.limited_answers"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
PARENT = f"""
from pocl.limited_process import LimitedProcess
child = LimitedProcess({ANSWERS!r}, memory_bytes=64 << 20)
child.call({{"name": "echo", "arguments": [1]}}, seconds=5)
print(child.pid, flush=True)
child.call({{"name": "loop"}}, seconds=1000)
"""


@pytest.fixture(scope="module")
def child() -> Iterator[LimitedProcess]:
    with LimitedProcess(ANSWERS, memory_bytes=64 << 20, answer_bytes=1 << 20) as process:
        yield process


def call(child: LimitedProcess, name: str, *arguments: object, seconds: float = 5) -> Any:
    return child.call({"name": name, "arguments": arguments}, seconds=seconds)


@pytest.mark.parametrize(
    ("request_", "seconds", "error", "says"),
    [
        (["loop"], 0.2, ProcessOutOfTime, "takes more than 0.2 s"),
        (["sleep", 1000], 0.02, ProcessOutOfTime, "takes more than 0.02 s"),
        (["allocate", 1 << 40], 5, ProcessOutOfMemory, "needs more than 64 MiB of memory"),
        (["allocate", 100 << 20], 5, ProcessOutOfMemory, "needs more than 64 MiB of memory"),
        (["keep allocating"], 5, ProcessOutOfMemory, "needs more than 64 MiB of memory"),
        (["echo", "x" * (80 << 20)], 5, ProcessOutOfMemory, "needs more than 64 MiB of memory"),
        (["long answer", 1 << 20], 5, ProcessAnswerTooLarge, "gives more than 1 MiB"),
        (["raise"], 5, ProcessCrashed, "fails unexpectedly (RuntimeError: not foreseen)"),
        (["abort"], 5, ProcessCrashed, "crashes (signal 6)"),
    ],
)
def test_request_beyond_a_limit_is_refused_and_the_next_one_answered(
    child: LimitedProcess, request_: list[Any], seconds: float, error: type[ProcessFailed], says: str
) -> None:
    with pytest.raises(error) as raised:
        call(child, *request_, seconds=seconds)
    assert str(raised.value) == says
    assert child.pid is None
    assert call(child, "echo", "well") == "well"


def test_what_fits_into_the_limits_is_answered(child: LimitedProcess) -> None:
    assert call(child, "allocate", 40 << 20) == 40 << 20
    length = (1 << 20) - 2
    assert call(child, "long answer", length) == "x" * length


@given(JSON)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_answer_is_what_the_module_returned(child: LimitedProcess, value: object) -> None:
    assert call(child, "echo", value) == value


def test_many_requests_are_answered_by_one_process(child: LimitedProcess) -> None:
    before = call(child, "calls")
    pid = child.pid
    for number in range(200):
        assert call(child, "echo", number) == number
    assert call(child, "calls") == before + 201
    assert child.pid == pid


def test_process_that_was_killed_between_two_requests_is_started_again(child: LimitedProcess) -> None:
    call(child, "echo", 1)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert call(child, "echo", 1) == 1


def test_process_gets_no_secret_prints_nothing_between_and_writes_no_file(
    child: LimitedProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child.close()
    monkeypatch.setenv("POCL_API_KEY", "a key of the service")
    environment = call(child, "environment")
    assert not [name for name in environment if name.startswith("POCL")]
    assert call(child, "print") is None
    with pytest.raises(ProcessCrashed):
        call(child, "write file", str(tmp_path / "file"))


def test_process_starts_without_the_modules_of_its_parent(child: LimitedProcess) -> None:
    loaded = set(call(child, "modules"))
    assert loaded.isdisjoint({"torch", "transformers", "numpy", "pydantic", "sqlalchemy", "fastapi"})


def test_module_that_cannot_be_imported_is_an_error() -> None:
    with LimitedProcess("tests.support.no_such_module", memory_bytes=1 << 20) as process:
        with pytest.raises(ProcessCrashed, match="its module cannot be imported") as raised:
            process.call({}, seconds=1)
        assert "No module named 'tests.support.no_such_module'" in raised.value.log


def test_killed_parent_takes_along_a_child_that_is_at_work() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert _runs(pid)
        parent.kill()
    eventually(lambda: not _runs(pid))


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            # An orphan stays as a zombie where nothing reaps it.
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
