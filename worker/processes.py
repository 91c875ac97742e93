"""Child processes in a group of their own that do not outlive the process that started them."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
# Looked up once, before any fork: the child may not take the loader's lock.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def spawn(
    command: Sequence[str],
    *,
    stdout: IO[bytes] | int,
    stderr: IO[bytes] | int = subprocess.STDOUT,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    death_signal: signal.Signals = signal.SIGKILL,
    user: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own.

    On Linux the kernel sends `death_signal` to it when the calling thread ends, so call this from the
    main thread. Elsewhere only an orderly end of the caller stops it.

    Args:
        environment: its whole environment; the caller's where None.
        user: numeric id of the user and the group to become; needs root.
    """
    return subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=None if environment is None else dict(environment),
        cwd=directory,
        start_new_session=True,
        preexec_fn=_bound_to_parent(os.getpid(), death_signal),
        user=user,
        group=user,
        extra_groups=None if user is None else (),
    )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process and of all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def terminate(process: subprocess.Popen[bytes], grace: float) -> int:
    """Ask the process to end, kill what is left of its group after `grace` seconds; its exit status.

    Only the process itself is asked: it knows in which order its own children stop.
    """
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    # It may be gone while what it started is not.
    kill_group(process)
    return process.wait()


def _bound_to_parent(parent: int, number: signal.Signals) -> Callable[[], None] | None:
    if _libc is None:
        return None
    prctl = _libc.prctl

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        # The parent may have died before the kernel was told.
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return before_exec
