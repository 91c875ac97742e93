"""Child processes die with their parent, and are killed with their own children."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness import processes_mentioning
from tests.support.waiting import eventually
from worker.processes import kill_group, spawn, terminate

pytestmark = pytest.mark.system

IGNORES_SIGTERM = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nwhile True: signal.pause()"
)
HANDLES_SIGTERM = (
    "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('up', flush=True); signal.pause()"
)
LEAVES_A_CHILD = (
    "import subprocess, sys\n"
    "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()', sys.argv[1]])\n"
    "print('up', flush=True)"
)
PARENT = (
    "import subprocess, sys\n"
    "from pathlib import Path\n"
    "from worker.processes import spawn\n"
    "spawn([sys.executable, '-c', 'import signal; signal.pause()', sys.argv[1]], stdout=subprocess.DEVNULL)\n"
    "print('up', flush=True); import signal; signal.pause()"
)


def start(script: str, mark: Path) -> subprocess.Popen[bytes]:
    log = mark / "log"
    with log.open("wb") as output:
        process = spawn([sys.executable, "-c", script, str(mark)], stdout=output)
    eventually(lambda: b"up" in log.read_bytes())
    return process


def test_killed_parent_takes_its_child_along(tmp_path: Path) -> None:
    parent = start(PARENT, tmp_path)
    assert len(processes_mentioning(str(tmp_path))) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    eventually(lambda: not processes_mentioning(str(tmp_path)))


def test_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    assert terminate(start(IGNORES_SIGTERM, tmp_path), grace=0.1) == -signal.SIGKILL


def test_process_that_handles_sigterm_exits_by_itself(tmp_path: Path) -> None:
    assert terminate(start(HANDLES_SIGTERM, tmp_path), grace=30) == 7


def test_children_of_an_exited_process_are_killed_too(tmp_path: Path) -> None:
    process = start(LEAVES_A_CHILD, tmp_path)
    process.wait()
    assert len(processes_mentioning(str(tmp_path))) == 1
    kill_group(process)
    eventually(lambda: not processes_mentioning(str(tmp_path)))
    kill_group(process)


LEAVES_STRAYS = (
    "import subprocess, sys\n"
    "from worker.processes import adopt_orphans, kill_children\n"
    "adopt_orphans()\n"
    # An engine that starts a process in a session of its own, without anything of its environment, and ends.
    'code = \'import subprocess, sys; subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()",\'\n'
    "code += 'sys.argv[1]], start_new_session=True, env={})'\n"
    "subprocess.run([sys.executable, '-c', code, sys.argv[1]])\n"
    "print('up', kill_children(), flush=True)"
)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt others")
def test_process_that_left_its_session_is_killed_by_whoever_adopted_it(tmp_path: Path) -> None:
    process = start(LEAVES_STRAYS, tmp_path)
    process.wait()
    assert (tmp_path / "log").read_text() == "up 1\n"
    assert processes_mentioning(str(tmp_path)) == {}
