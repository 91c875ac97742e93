"""The process that holds the client of a tracker: asked one thing at a time, and killed where it does not answer."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import structlog

from domain.jobs.tracker_feed import TrackedPoint, TrackedRun
from domain.trackers.models import TrackerChannel, TrackerKind
from worker.client_environment import client_environment
from worker.processes import kill_group, spawn
from worker.python_path import module_command
from worker.trackers.client import CannotTrack, OpenedRun

_log = structlog.get_logger(__name__)

_MAX_ANSWER_BYTES: Final = 4 * 1024**2
_KINDS: Final[Mapping[TrackerChannel, TrackerKind]] = {
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "wandb": "wandb",
    "wandb_offline": "wandb",
}
_PASSED_ON: Final = ("MLFLOW_", "WANDB_", "DATABRICKS_")
"""How the variables begin that configure the clients of trackers."""


class TrackerProcess:
    """The client of a channel in a process of its own, started when it is first asked.

    Args:
        directory: where the client may keep files; made if need be.
        timeout_seconds: how long an answer may take.
        environ: the environment of this process, of which the client gets what it needs.
        command: what is started; the client of the channel unless given.
    """

    def __init__(
        self,
        channel: TrackerChannel,
        directory: Path,
        *,
        timeout_seconds: float,
        environ: Mapping[str, str] = os.environ,
        command: Sequence[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = command or module_command(sys.executable, "worker.trackers", _KINDS[channel])
        self._directory = directory
        self._timeout_seconds = timeout_seconds
        self._environ = environ
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._unread = b""

    @property
    def pid(self) -> int | None:
        """The id of the process; null while there is none."""
        return None if self._process is None else self._process.pid

    def open(self, run: TrackedRun) -> OpenedRun:
        """Open the run of a job. Files of an earlier time are removed first.

        Raises:
            CannotTrack: it was refused, or no answer came in time.
        """
        answer = self._ask({"do": "open", "run": asdict(run), "directory": str(self.directory_of(run.job_id))})
        return OpenedRun(answer["run_id"], answer["run_url"], answer["last_steps"])

    def send(self, job_id: str, points: Sequence[TrackedPoint]) -> None:
        """Send values to the run of a job.

        Raises:
            CannotTrack: as of :meth:`open`.
        """
        self._ask({"do": "send", "job_id": job_id, "points": [[point.step, dict(point.values)] for point in points]})

    def end_run(self, job_id: str, status: str, tags: Mapping[str, str]) -> Path | None:
        """Close the run of a job; the file that was made, if one is.

        Raises:
            CannotTrack: as of :meth:`open`.
        """
        answer = self._ask({"do": "close", "job_id": job_id, "status": status, "tags": dict(tags)})
        return None if answer["file"] is None else Path(answer["file"])

    def directory_of(self, job_id: str) -> Path:
        """The directory for the files of a run, which exists."""
        directory = self._directory / job_id
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory

    def interrupt(self) -> None:
        """Have a question that another thread waits for fail at once, as if the client had ended."""
        connection = self._connection
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """End the process and all that it started. The next question starts it anew."""
        if self._process is not None:
            kill_group(self._process)
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None
        self._unread = b""

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        deadline = self._clock() + self._timeout_seconds
        try:
            connection = self._connection or self._start(deadline)
            self._write(connection, request, deadline)
            answer: dict[str, Any] = json.loads(self._read_line(connection, deadline))
        except TimeoutError:
            self.kill()
            message = f"It gave no answer within {self._timeout_seconds:g} seconds."
            raise CannotTrack("tracker_timed_out", message) from None
        except (OSError, ValueError) as error:
            self.kill()
            raise CannotTrack("tracker_error", "Its client ended.") from error
        if "error" in answer:
            _log.warning("tracker_refused", code=answer["error"], detail=str(answer.get("detail"))[:2000])
            raise CannotTrack(str(answer["error"]), str(answer["message"]))
        return answer

    def _start(self, deadline: float) -> socket.socket:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = spawn(
                self._command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                environment=client_environment(self._environ),
                directory=self._directory,
            )
        self._connection = ours
        self._write(ours, self._secret_environment(), deadline)
        return ours

    def _secret_environment(self) -> dict[str, str]:
        """What configures the client: it comes by the socket, where no other process reads it."""
        own = {name: value for name, value in self._environ.items() if name.startswith(_PASSED_ON)}
        directories = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
        return {
            # Seven tries with growing waits would take minutes: it is tried again anyway.
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "WANDB_ERROR_REPORTING": "false",
            **own,
            **{name: str(self._directory) for name in directories},
            "TMPDIR": str(self._directory),
        }

    def _write(self, connection: socket.socket, message: Mapping[str, Any], deadline: float) -> None:
        connection.settimeout(self._left(deadline))
        connection.sendall(json.dumps(message).encode() + b"\n")

    def _read_line(self, connection: socket.socket, deadline: float) -> bytes:
        while b"\n" not in self._unread:
            connection.settimeout(self._left(deadline))
            read = connection.recv(65536)
            if not read or len(self._unread) > _MAX_ANSWER_BYTES:
                raise ConnectionError("the client of the tracker has ended, or its answer is too long")
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _left(self, deadline: float) -> float:
        left = deadline - self._clock()
        if left <= 0:
            raise TimeoutError
        return left
