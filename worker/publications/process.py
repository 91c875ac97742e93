"""The process that pushes one student: started for it, asked once, and killed where it does not answer in time."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from worker.client_environment import client_environment
from worker.processes import kill_group, spawn
from worker.publications.push import CannotPush, Push, Pushed
from worker.python_path import module_command

_log = structlog.get_logger(__name__)

_LOOK_SECONDS: Final = 0.25
_MAX_ANSWER_BYTES: Final = 64 * 1024
_PREFIX: Final = "HF_"
_NOT_PASSED_ON: Final = frozenset({"HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"})
"""Settings of the Hub's client that are about reading, or that this process has otherwise."""


class BrokenOff(Exception):
    """The push was broken off on the side of the scheduler."""


class PushProcess:
    """Pushes by a process of its own each time.

    Args:
        token: what it writes with.
        timeout_seconds: how long a push may take in all.
        environ: the environment of this process, of which the client gets what it needs.
        command: what is started; the client of the Hub unless given.
    """

    def __init__(
        self,
        token: str,
        *,
        timeout_seconds: float,
        environ: Mapping[str, str] = os.environ,
        command: Sequence[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._token = token
        self._timeout_seconds = timeout_seconds
        self._environ = environ
        self._command = command or module_command(sys.executable, "worker.publications")
        self._clock = clock

    def push(self, request: Push, is_broken_off: Callable[[], bool] = lambda: False) -> Pushed:
        """Push, and wait for what comes of it.

        Args:
            is_broken_off: asked now and then; once it is true the process is killed.

        Raises:
            CannotPush: with the reason.
            BrokenOff: `is_broken_off` said so.
        """
        deadline = self._clock() + self._timeout_seconds
        with tempfile.TemporaryDirectory(prefix="pocl-push-", ignore_cleanup_errors=True) as name:
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    process = self._start(theirs, Path(name))
                try:
                    answer = self._ask(ours, request, Path(name), deadline, is_broken_off)
                finally:
                    kill_group(process)
                    process.wait()
        if "error" in answer:
            _log.warning("push_refused", repo=request.repo, code=answer["error"], detail=str(answer.get("detail")))
            raise CannotPush(
                str(answer["error"]),
                str(answer["message"]),
                is_final=bool(answer.get("is_final")),
                retry_after=answer.get("retry_after"),
            )
        return Pushed(str(answer["commit"]), str(answer["url"]), is_new=bool(answer["is_new"]))

    def _start(self, theirs: socket.socket, directory: Path) -> subprocess.Popen[bytes]:
        return spawn(
            self._command,
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            environment=client_environment(self._environ),
            directory=directory,
        )

    def _ask(
        self,
        connection: socket.socket,
        request: Push,
        directory: Path,
        deadline: float,
        is_broken_off: Callable[[], bool],
    ) -> dict[str, Any]:
        message = {"push": request.as_json(), "token": self._token, "environment": self._client_settings(directory)}
        try:
            connection.settimeout(max(1.0, deadline - self._clock()))
            connection.sendall(json.dumps(message).encode() + b"\n")
            connection.settimeout(_LOOK_SECONDS)
            line = b""
            while not line.endswith(b"\n"):
                if is_broken_off():
                    raise BrokenOff
                if self._clock() >= deadline:
                    raise CannotPush("push_timed_out", f"It was not pushed within {self._timeout_seconds:g} seconds.")
                try:
                    read = connection.recv(65536)
                except TimeoutError:
                    continue
                if not read or len(line) > _MAX_ANSWER_BYTES:
                    raise ConnectionError("the process that pushes has ended, or its answer is too long")
                line += read
            answer: dict[str, Any] = json.loads(line)
        except (OSError, ValueError) as error:
            raise CannotPush("push_ended", "The process that pushes ended before it was done.") from error
        return answer

    def _client_settings(self, directory: Path) -> dict[str, str]:
        own = {
            name: value
            for name, value in self._environ.items()
            if name.startswith(_PREFIX) and name not in _NOT_PASSED_ON
        }
        return {
            # By LFS, in one way to every server that speaks it: 0 has it use Xet, where that is installed.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **own,
            "HF_HOME": str(directory),
            "TMPDIR": str(directory),
        }
