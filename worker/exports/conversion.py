"""The process that writes one export, `python -m pocl export-gguf`. It gets no secret, stands behind the sandbox of
engines, has limits on memory, time and the size of files, and comes after others where processors are short.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from domain.jobs.export_feed import ExportFailure
from domain.settings import Settings
from pocl.container_limits import available_memory_bytes
from pocl.spec import GgufFormat
from worker.bounded_log import BoundedLog
from worker.client_environment import client_environment
from worker.engine_limits import limit_engine
from worker.engine_sandbox import sandbox
from worker.processes import kill_group, spawn
from worker.python_path import module_command
from worker.settings import WorkerSettings

_log = structlog.get_logger(__name__)

_LOOK_SECONDS: Final = 0.1
_NICENESS: Final = 10
_MAX_ANSWER_BYTES: Final = 1 << 20
_LOG_TAIL_BYTES: Final = 2048
_FIXED_BYTES: Final = 256 << 20
"""What a file may have besides twice the checkpoint: tokenizer and templates, and bf16 weights become fp32."""
_FAULTS: Final = frozenset({"user", "capacity", "system"})


class BrokenOff(Exception):
    """The export was broken off on the side of the worker."""


class CannotExport(Exception):
    """An attempt did not make the files.

    Args:
        is_final: whether another attempt would end the same way.
    """

    def __init__(self, failure: ExportFailure, *, is_final: bool = False) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.is_final = is_final


@dataclass(frozen=True)
class WrittenExport:
    """What the process wrote."""

    files: Sequence[str]
    """The names of the files, without the manifest."""
    notes: Sequence[str]
    """Sentences on what differs from the checkpoint."""


@dataclass(frozen=True)
class GgufConversion:
    """Writes checkpoints as GGUF, by a process of its own each time. Only the main thread may use it: the process dies
    with the thread that starts it.
    """

    settings: Settings
    options: WorkerSettings
    command: Sequence[str] = tuple(module_command(sys.executable, "pocl", "export-gguf"))
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    clock: Callable[[], float] = time.monotonic

    def write(
        self,
        source: Path,
        scratch: Path,
        export_format: GgufFormat,
        *,
        source_bytes: int,
        is_broken_off: Callable[[], bool],
    ) -> tuple[Path, WrittenExport]:
        """Write a model directory as GGUF into a new directory below `scratch`, with a manifest.

        Args:
            source_bytes: the size of the model directory.
            is_broken_off: asked now and then; once it is true the process is killed.

        Raises:
            CannotExport: with the reason.
            BrokenOff: `is_broken_off` said so.
            OSError: the process cannot be started.
        """
        target, temporary = scratch / "gguf", scratch / "tmp"
        temporary.mkdir()
        log = BoundedLog(scratch / "export.log", self.options.max_engine_log_bytes)
        answer_file = scratch / "answer.json"
        command = [*self.command, str(source), str(target), "--format", export_format, "--json"]
        deadline = self.clock() + self.options.export_timeout_seconds
        environment = self._environment(temporary)
        with (
            log.open() as errors,
            answer_file.open("wb") as answers,
            sandbox(self.options.sandbox, self.settings, scratch, environment) as restrict,
        ):
            process = spawn(
                command,
                stdout=answers,
                stderr=errors,
                environment=environment,
                directory=scratch,
                restrict=_limits(restrict, 2 * source_bytes + _FIXED_BYTES),
            )
        try:
            available = self.options.memory_bytes or available_memory_bytes()
            limit_engine(process.pid, min(self.options.export_memory_bytes, available))
            status = self._wait(process, log, deadline, is_broken_off)
        finally:
            kill_group(process)
            process.wait()
        return target, self._read_answer(answer_file, status, log)

    def _wait(
        self,
        process: subprocess.Popen[bytes],
        log: BoundedLog,
        deadline: float,
        is_broken_off: Callable[[], bool],
    ) -> int:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_LOOK_SECONDS)
            log.trim()
            if is_broken_off():
                raise BrokenOff
            if self.clock() >= deadline:
                seconds = self.options.export_timeout_seconds
                message = f"It was not written within {seconds:g} seconds (POCL_WORKER_EXPORT_TIMEOUT_SECONDS)."
                raise CannotExport(ExportFailure("export_timed_out", message, "capacity"))

    def _read_answer(self, answer_file: Path, status: int, log: BoundedLog) -> WrittenExport:
        try:
            with answer_file.open("rb") as file:
                answer: Any = json.loads(file.read(_MAX_ANSWER_BYTES))
            if status == 0:
                return WrittenExport([str(each) for each in answer["files"]], [str(each) for each in answer["notes"]])
            error = answer["error"]
            failure = ExportFailure(str(error["code"])[:64], str(error["message"])[:1000], error["fault"])
        except (OSError, ValueError, KeyError, TypeError):
            _log.error("export_process_ended", status=status, log=log.tail(_LOG_TAIL_BYTES).decode(errors="replace"))
            raise CannotExport(_without_answer(status)) from None
        if failure.fault not in _FAULTS:
            raise CannotExport(_without_answer(status))
        raise CannotExport(failure, is_final=failure.fault == "user")

    def _environment(self, temporary: Path) -> dict[str, str]:
        """It reads files of this machine alone, and computes on one processor."""
        return {
            **client_environment(self.environ),
            "HOME": str(temporary),
            "HF_HOME": str(temporary),
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(temporary),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }


def _limits(restrict: Callable[[], None] | None, file_bytes: int) -> Callable[[], None]:
    """What the process does before it is another program."""

    def apply() -> None:
        os.nice(_NICENESS)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        if restrict is not None:
            restrict()

    return apply


def _without_answer(status: int) -> ExportFailure:
    if status == -9:
        message = "The process that writes it was killed, most often since the machine had no memory left."
        return ExportFailure("export_killed", message, "capacity")
    return ExportFailure("export_ended", "The process that writes it ended before it was done.", "system")
