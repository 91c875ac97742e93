"""Several processes of the API on one socket, under a parent that replaces those that end or stand still.

The parent binds the socket, forks, and serves nothing itself. A connection waits in the one queue of that socket until
any process accepts it, so what a process leaves behind when it dies is its own connections alone. All of them run
the code that the parent has loaded: one that is replaced during an upgrade is of the same version as the others.
"""

import ctypes
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

import structlog
from uvicorn.config import STARTUP_FAILURE

from api.server import GRACE_SECONDS

_POLL_SECONDS: Final = 0.1
_MAX_START_SECONDS: Final = 120.0
_MAX_SILENT_SECONDS: Final = 60.0
"""A process whose event loop has not turned for so long is replaced: its clients wait in vain, and no probe finds it,
since the other processes answer in its place."""
_MAX_GAP_SECONDS: Final = 5.0
"""Between two looks of the parent; after a longer one it was itself that stood still."""
_EXIT_WINDOW_SECONDS: Final = 300.0
_MAX_BACKOFF_SECONDS: Final = 30.0
_STOP_MARGIN_SECONDS: Final = 10.0
"""How much longer than the grace for requests a process may take to end."""
_TURN: Final = struct.Struct("d")
_PR_SET_PDEATHSIG: Final = 1
# Looked up once, before any fork: the child may not take the loader's lock.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None

_log = structlog.get_logger(__name__)


class Turns:
    """When the event loop of each process turned last, in memory that parent and children share."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, count * _TURN.size)

    def record(self, index: int) -> None:
        """Record that the loop of a process turns now."""
        _TURN.pack_into(self._memory, index * _TURN.size, time.monotonic())

    def clear(self, index: int) -> None:
        """Forget the turns of a process that has ended."""
        _TURN.pack_into(self._memory, index * _TURN.size, 0.0)

    def last(self, index: int) -> float:
        """Monotonic seconds; 0 before the first turn."""
        return float(_TURN.unpack_from(self._memory, index * _TURN.size)[0])


@dataclass
class _Process:
    """One place among the processes, and the process that has it now."""

    index: int
    pid: int | None = None
    started_at: float = 0.0
    exit_times: deque[float] = field(default_factory=deque)
    """Monotonic seconds of the exits that nobody asked for, within the window."""


@dataclass
class ProcessGroup:
    """Keeps `count` processes running until a signal asks for the end.

    Args:
        count: how many.
        sockets: the bound sockets that they share; the parent closes its own when it stops.
        serve: what a process does, given a function that it calls at each turn of its event loop; its exit status.
        clock: monotonic seconds.
    """

    count: int
    sockets: Sequence[socket.socket]
    serve: Callable[[Callable[[], None]], int]
    clock: Callable[[], float] = time.monotonic
    _stopping: threading.Event = field(default_factory=threading.Event)
    _requests: int = 0
    _looked_at: float = 0.0
    _awake_since: float = 0.0
    """When the parent itself went on after it had stood still, as with its machine or its container."""

    def run(self) -> int:
        """Start the processes, and replace those that end until SIGTERM, SIGINT or SIGHUP; then end them all.

        Requests under way have :data:`api.server.GRACE_SECONDS`; a second signal ends the processes at once. SIGINT
        and SIGHUP go on being ignored where they were at the start, as by the `&` of a script and by `nohup`.

        Returns:
            the exit status: 0, or that of a process that could not start before all had.
        """
        self._turns = Turns(self.count)
        self._processes = [_Process(index) for index in range(self.count)]
        signal.signal(signal.SIGTERM, self._request_stop)
        for number in (signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._request_stop)
        is_complete = False
        for process in self._processes:
            self._start(process)
        while not self._stopping.wait(_POLL_SECONDS):
            self._note_own_silence()
            for process in self._processes:
                status = self._look_after(process)
                if status == STARTUP_FAILURE and not is_complete:
                    # It would fail in the same way again.
                    self._stop()
                    return STARTUP_FAILURE
            if not is_complete and all(self._turns.last(process.index) for process in self._processes):
                is_complete = True
                _log.info("api_ready", processes=[process.pid for process in self._processes])
        self._stop()
        return 0

    def _request_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._requests += 1
        self._stopping.set()

    def _start(self, process: _Process) -> None:
        self._turns.clear(process.index)
        process.started_at = self.clock()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            process.pid = pid
            return
        status = 1
        try:
            _become_child_of(parent)
            status = self.serve(lambda: self._turns.record(process.index))
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001 - whatever it is, the child must not go on as a second parent
            _log.exception("api_process_failed")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _look_after(self, process: _Process) -> int | None:
        """Start a process anew where it has ended, after a growing pause, and end one that stands still.

        Returns:
            the exit status of a process that was found to have ended; null otherwise.
        """
        now = self.clock()
        if process.pid is None:
            if now >= process.exit_times[-1] + _backoff_seconds(len(process.exit_times)):
                self._start(process)
            return None
        pid, wait_status = os.waitpid(process.pid, os.WNOHANG)
        if pid == 0:
            self._end_if_silent(process, now)
            return None
        status = os.waitstatus_to_exitcode(wait_status)
        process.pid = None
        process.exit_times.append(now)
        while now - process.exit_times[0] > _EXIT_WINDOW_SECONDS:
            process.exit_times.popleft()
        pause = _backoff_seconds(len(process.exit_times))
        _log.warning("api_process_exited", pid=pid, status=status, next_in_seconds=pause)
        return status

    def _note_own_silence(self) -> None:
        now = self.clock()
        if now - self._looked_at > _MAX_GAP_SECONDS:
            self._awake_since = now
        self._looked_at = now

    def _end_if_silent(self, process: _Process, now: float) -> None:
        last = self._turns.last(process.index)
        silent_seconds = now - max(last or process.started_at, self._awake_since)
        if silent_seconds > (_MAX_SILENT_SECONDS if last else _MAX_START_SECONDS) and process.pid is not None:
            _log.warning("api_process_silent", pid=process.pid, seconds=round(silent_seconds))
            _signal(process.pid, signal.SIGKILL)

    def _stop(self) -> None:
        # A connection that nobody will accept must not wait in the queue of the socket.
        for each in self.sockets:
            each.close()
        for process in self._processes:
            if process.pid is not None:
                _signal(process.pid, signal.SIGTERM)
        requests, deadline = self._requests, self.clock() + GRACE_SECONDS + _STOP_MARGIN_SECONDS
        while self._reap() and self.clock() < deadline and self._requests <= max(requests, 1):
            time.sleep(_POLL_SECONDS / 4)
        for process in self._processes:
            if process.pid is not None:
                _signal(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)

    def _reap(self) -> bool:
        """Take note of the processes that have ended; whether others still run."""
        for process in self._processes:
            if process.pid is not None and os.waitpid(process.pid, os.WNOHANG)[0]:
                process.pid = None
        return any(process.pid is not None for process in self._processes)


def _become_child_of(parent: int) -> None:
    """End with the parent, and leave it to the parent what a closed terminal means."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Uvicorn raises the signal that ended it once more, when all is done.
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    # The parent may have died before the call.
    if os.getppid() != parent:
        os._exit(1)


def _exit(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def _backoff_seconds(exits: int) -> float:
    """How long the start of a process waits after so many exits within the window."""
    return float(min(0.25 * 2 ** (exits - 1), _MAX_BACKOFF_SECONDS))


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
