"""The process that answers conversations, `python -m pocl.chat`: questions in, events out, line by line."""

import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pydantic import ValidationError

from domain.settings import Settings
from pocl.chat.protocol import (
    AnswerCancelled,
    AnswerFailed,
    AnswerFinished,
    AnswerPart,
    ChatCancel,
    ChatQuestion,
    chat_events,
)
from pocl.container_limits import available_memory_bytes
from worker.attempt_dir import SCRATCH_PREFIX
from worker.bounded_log import BoundedLog
from worker.engine_limits import limit_engine, memory_limit
from worker.engine_sandbox import sandbox
from worker.processes import kill_group, spawn, terminate
from worker.settings import WorkerSettings

_MAX_LINE_BYTES: Final = 1 << 20
"""Of an event: an answer of the most tokens has a tenth of it."""
_READ_BYTES: Final = 1 << 16
_LOG_TAIL_BYTES: Final = 4096

ChatEvent = AnswerPart | AnswerFinished | AnswerFailed | AnswerCancelled


class ChatProcessFailed(Exception):
    """The process has ended, or writes what it should not."""


class ChatProcess:
    """A process with a directory of its own, started by :meth:`start` and ended, with all that it started, by
    :meth:`close`. Only the main thread may start one: it dies with the thread that does.

    Args:
        environment: makes the environment of the process, given its directory for temporary files.
        command: the command line.
        is_on_gpu: whether its memory is that of a GPU as well, so that no limit is put on it.
    """

    def __init__(
        self,
        settings: Settings,
        options: WorkerSettings,
        command: Sequence[str],
        environment: Callable[[Path], Mapping[str, str]],
        *,
        is_on_gpu: bool,
    ) -> None:
        self._settings = settings
        self._options = options
        self._command = command
        self._environment = environment
        self._is_on_gpu = is_on_gpu
        settings.work_root.mkdir(parents=True, exist_ok=True)
        # A worker that is killed leaves it; it is removed as what killed workers left of attempts is.
        self._directory = tempfile.TemporaryDirectory(
            prefix=f"{SCRATCH_PREFIX}chat-", dir=settings.work_root, ignore_cleanup_errors=True
        )
        self._path = Path(self._directory.name)
        self._log = BoundedLog(self._path / "chat.log", options.max_engine_log_bytes)
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()
        self._directory.cleanup()

    @property
    def inputs_dir(self) -> Path:
        """Where models are fetched to that a bucket has."""
        return self._path / "inputs"

    @property
    def is_running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process, unless it runs.

        Raises:
            OSError: it cannot be started.
        """
        if self.is_running:
            return
        self.close()
        temporary = self._path / "tmp"
        for directory in (temporary, self.inputs_dir):
            directory.mkdir(exist_ok=True)
        environment = self._environment(temporary)
        with (
            self._log.open() as errors,
            sandbox(self._options.sandbox, self._settings, self._path, environment) as restrict,
        ):
            self._process = spawn(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                environment=environment,
                directory=self._path,
                restrict=restrict,
            )
        available = self._options.memory_bytes or available_memory_bytes()
        limit = None if self._is_on_gpu else memory_limit(None, self._options.memory_factor, available)
        limit_engine(self._process.pid, limit)
        self._unread = b""

    def ask(self, question: ChatQuestion) -> None:
        """Ask a question; the process must answer no other at the time.

        Raises:
            ChatProcessFailed: the process has ended.
        """
        self._write(question)

    def cancel(self, question_id: str) -> None:
        """Ask the process to end the answer to a question.

        Raises:
            ChatProcessFailed: the process has ended.
        """
        self._write(ChatCancel(id=question_id))

    def read(self, *, seconds: float) -> list[ChatEvent]:
        """The events that have come; waits for the first for so long.

        Raises:
            ChatProcessFailed: the process has ended, or an event cannot be read.
        """
        process = self._process
        if process is None or process.stdout is None:
            raise ChatProcessFailed
        self._log.trim()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return []
        received = os.read(process.stdout.fileno(), _READ_BYTES)
        if not received:
            raise ChatProcessFailed
        *lines, self._unread = (self._unread + received).split(b"\n")
        if len(self._unread) > _MAX_LINE_BYTES:
            raise ChatProcessFailed
        try:
            return [chat_events.validate_json(line) for line in lines]
        except ValidationError as error:
            raise ChatProcessFailed from error

    def log_tail(self) -> bytes:
        """The end of what the process wrote to standard error."""
        return self._log.tail(_LOG_TAIL_BYTES)

    def close(self, *, grace: float = 0) -> None:
        """End the process, and all that it started.

        Args:
            grace: seconds that it may take to end by itself.
        """
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        if grace:
            terminate(process, grace)
        kill_group(process)
        process.wait()

    def drain(self, question_id: str, *, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Wait for the end of an answer that nobody wants any more; the process is ended where it does not come."""
        until = clock() + seconds
        try:
            self.cancel(question_id)
            while (left := until - clock()) > 0:
                events = self.read(seconds=left)
                if any(not isinstance(event, AnswerPart) and event.id == question_id for event in events):
                    return
        except ChatProcessFailed:
            pass
        self.close()

    def _write(self, line: ChatQuestion | ChatCancel) -> None:
        process = self._process
        if process is None or process.stdin is None:
            raise ChatProcessFailed
        try:
            process.stdin.write(line.model_dump_json().encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            raise ChatProcessFailed from error
