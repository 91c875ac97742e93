"""Child processes, each with a process group of its own, that do not outlive their parent."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from domain.process_stat import PARENT, read_stat

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_STRAYS_SECONDS = 10
# Looked up once, before any fork: the child may not take the loader's lock.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def spawn(
    command: Sequence[str],
    *,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
    stdout: IO[bytes] | int,
    stderr: IO[bytes] | int = subprocess.STDOUT,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    death_signal: signal.Signals = signal.SIGKILL,
    user: int | None = None,
    restrict: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own.

    On Linux the kernel sends `death_signal` to it when the calling thread ends, so call this from the
    main thread. Elsewhere only an orderly end of the caller stops it.

    Args:
        environment: The whole environment of the process; that of the caller where None.
        user: Numeric id of the user and group to run as; needs root.
        restrict: Called in the child before `command` takes its place, to give up rights.
    """
    return subprocess.Popen(
        list(command),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=None if environment is None else dict(environment),
        cwd=directory,
        start_new_session=True,
        preexec_fn=_before_exec(os.getpid(), death_signal, restrict),
        user=user,
        group=user,
        extra_groups=None if user is None else (),
    )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process group: the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def terminate(process: subprocess.Popen[bytes], grace: float) -> int:
    """Send SIGTERM, and kill what is left of the group after at most `grace` seconds; the exit status.

    Only the process itself gets SIGTERM: it knows in which order its own children stop.
    """
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    # The process may have exited while its own children have not.
    kill_group(process)
    return process.wait()


def adopt_orphans() -> None:
    """Become the parent of processes whose own parents below this one have ended, whatever session they are in.

    Only then :func:`kill_children` finds them. Without Linux it does nothing.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def hide_memory() -> None:
    """Let other processes of the same user read neither this one's memory nor its environment (`/proc/PID/environ`).

    Children inherit it until they execute another program. Without Linux it does nothing.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def kill_children() -> int:
    """Kill every child of this process, and those of them that it adopts meanwhile; how many there were.

    For a process that has no other children but an engine and what that left behind.
    """
    killed, deadline = 0, time.monotonic() + _STRAYS_SECONDS
    while (children := _children_of(os.getpid())) and time.monotonic() < deadline:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
            killed += 1
    return killed


def _children_of(parent: int) -> list[int]:
    children = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            if read_stat(entry.parent.name, PARENT) == parent:
                children.append(int(entry.parent.name))
    return children


def _before_exec(parent: int, number: signal.Signals, restrict: Callable[[], None] | None) -> Callable[[], None] | None:
    if _libc is None:
        return restrict
    prctl = _libc.prctl

    def before_exec() -> None:
        if restrict is not None:
            restrict()
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        # The parent may have died before the call.
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return before_exec
