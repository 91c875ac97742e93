"""A worker starts the process of its exports where some are due, gives it its secrets by a pipe, and ends with it."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from domain.workers.models import Device
from domain.workers.repository import drain, register_worker
from tests.support.harness import processes_mentioning
from tests.support.waiting import eventually
from tests.worker.exports.conftest import ExportedCheckpoints
from worker.exports.watcher import ExportWatcher

pytestmark = pytest.mark.system

NAME = "w1"
TELL = """
import json, os, sys, time
told = {"line": json.loads(sys.stdin.readline()), "environment": dict(os.environ)}
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(told) + chr(10))
if sys.argv[2] == "stays":
    time.sleep(600)
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def watcher(exported: ExportedCheckpoints, tmp_path: Path) -> Callable[[str], ExportWatcher]:
    """Makes one whose process tells what it was given, and then stays or ends with a status."""

    def make(then: str) -> ExportWatcher:
        environ = {**os.environ, "POCL_DATABASE_PASSWORD": "a-secret", "POCL_WORKER_QUEUE": "other"}
        command = [sys.executable, "-c", TELL, str(tmp_path / "told"), then]
        return ExportWatcher(exported.harness.database_url, NAME, 0.05, command=command, environ=environ)

    return make


def told(directory: Path) -> list[dict[str, dict[str, str]]]:
    file = directory / "told"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_secrets_come_by_the_pipe_alone_and_the_process_ends_with_its_worker(
    exported: ExportedCheckpoints, watcher: Callable[[str], ExportWatcher], tmp_path: Path
) -> None:
    exported.ask(exported.store())
    watching = watcher("stays")
    watching.start()
    eventually(lambda: bool(told(tmp_path)), within=60, what="the process has started")
    (only,) = told(tmp_path)
    assert only["line"]["POCL_DATABASE_PASSWORD"] == "a-secret"
    assert "a-secret" not in only["environment"].values()
    assert only["environment"]["POCL_WORKER_QUEUE"] == "other"
    assert processes_mentioning(str(tmp_path / "told"))
    watching.stop()
    assert processes_mentioning(str(tmp_path / "told")) == {}


def test_it_starts_nothing_where_nothing_is_due_or_the_worker_is_drained(
    exported: ExportedCheckpoints, watcher: Callable[[str], ExportWatcher], tmp_path: Path
) -> None:
    watching = watcher("0")
    assert not watching.is_due()
    exported.ask(exported.store())
    assert watching.is_due()
    with exported.harness.database.transaction(write=True) as session:
        register_worker(session, NAME, [Device("cpu", "cpu", None)])
        drain(session, NAME, "finish")
    assert not watching.is_due()
    assert told(tmp_path) == []


def test_a_process_that_fails_is_started_again(
    exported: ExportedCheckpoints, watcher: Callable[[str], ExportWatcher], tmp_path: Path
) -> None:
    exported.ask(exported.store())
    watching = watcher("1")
    watching.start()
    eventually(lambda: len(told(tmp_path)) >= 3, within=60, what="the process is started again")
    watching.stop()
