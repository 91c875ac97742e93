"""The process of a tracker's client: what it is told, and what becomes of one that hangs or ends."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from domain.jobs.tracker_feed import TrackedPoint, TrackedRun
from tests.support import fake_tracker
from tests.support.waiting import eventually
from worker.trackers.client import CannotTrack
from worker.trackers.process import TrackerProcess

pytestmark = pytest.mark.system

RUN = TrackedRun("job_1", "tracked", {"experiment": "kd"}, {"pocl.job": "job_1"}, {"seed": 1}, None, None, None)
LONG = 200
"""Seconds that no answer takes, however slow the machine is."""


def start(tmp_path: Path, mode: str = "answer", *, seconds: float = LONG, **environ: str) -> TrackerProcess:
    command = [sys.executable, fake_tracker.__file__, mode]
    return TrackerProcess("mlflow", tmp_path, timeout_seconds=seconds, environ=environ, command=command)


def test_secrets_come_by_the_socket_and_are_in_no_environment(tmp_path: Path) -> None:
    process = start(tmp_path, MLFLOW_TRACKING_TOKEN="secret", POCL_API_KEY="no business of it", HTTPS_PROXY="http://p")
    try:
        opened = process.open(RUN)
        request, environment = json.loads(opened.run_url or "")
        started_with = Path(f"/proc/{process.pid}/environ").read_bytes()
    finally:
        process.kill()
    assert (request["do"], request["run"]["job_id"], opened.run_id) == ("open", "job_1", "r1")
    assert environment["MLFLOW_TRACKING_TOKEN"] == "secret"
    assert "POCL_API_KEY" not in environment
    assert b"HTTPS_PROXY=http://p" in started_with
    assert b"secret" not in started_with
    assert process.pid is None


def test_a_client_that_hangs_is_killed_and_the_next_question_starts_another(tmp_path: Path) -> None:
    process = start(tmp_path, "hang", seconds=0.5)
    for _ in range(2):
        with pytest.raises(CannotTrack) as raised:
            process.send("job_1", [TrackedPoint(1, {"loss": 1.0})])
        assert raised.value.code == "tracker_timed_out"
        assert process.pid is None


def test_a_question_is_interrupted_from_another_thread(tmp_path: Path) -> None:
    process = start(tmp_path, "hang")
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(process.send, "job_1", [TrackedPoint(1, {"loss": 1.0})])

        def has_failed() -> bool:
            # Before the client has started it changes nothing.
            process.interrupt()
            return asked.done()

        eventually(has_failed, what="the question has failed")
    assert isinstance(asked.exception(), CannotTrack)
    assert process.pid is None


def test_a_client_that_takes_nothing_is_killed(tmp_path: Path) -> None:
    # It never reads, so that what it is sent does not fit into the socket.
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    process = TrackerProcess("mlflow", tmp_path, timeout_seconds=0.5, environ={}, command=command)
    with pytest.raises(CannotTrack, match="no answer"):
        process.send("job_1", [TrackedPoint(step, {"loss": 1.0}) for step in range(20_000)])
    assert process.pid is None


@pytest.mark.parametrize(("mode", "code"), [("die", "tracker_error"), ("refuse", "tracker_refused")])
def test_a_client_that_ends_or_refuses_says_why(tmp_path: Path, mode: str, code: str) -> None:
    process = start(tmp_path, mode)
    with pytest.raises(CannotTrack) as raised:
        process.end_run("job_1", "succeeded", {})
    assert raised.value.code == code
    process.kill()
