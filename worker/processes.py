"""Child processes, each with a process group of its own, that do not outlive their parent."""

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
        environment: The whole environment of the process; that of the caller where None.
        user: Numeric id of the user and group to run as; needs root.
    """
    return subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=None if environment is None else dict(environment),
        cwd=directory,
        start_new_session=True,
        preexec_fn=_die_with_parent(os.getpid(), death_signal),
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


def _die_with_parent(parent: int, number: signal.Signals) -> Callable[[], None] | None:
    if _libc is None:
        return None
    prctl = _libc.prctl

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        # The parent may have died before the call.
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return before_exec
