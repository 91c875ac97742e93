"""The check that a worker makes of itself: whether it can run any job at all.

A tiny job of random models goes through the very command that runs the engine of a job: on the worker's device, in the
work root, in the engine's environment. It needs what every job needs and nothing that only some need, such as a data
set, a model of a user or the Hub.
"""

import json
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
from pydantic import ValidationError

from domain.workers.models import Device
from pocl.events import RunEnded, from_line
from pocl.layout import EVENTS_FILE, ExitCode
from pocl.spec import resolve
from worker.attempt_dir import SCRATCH_PREFIX
from worker.processes import kill_group, spawn

_log = structlog.get_logger(__name__)

_TICK_SECONDS: Final = 0.2
_LOG_TAIL_BYTES: Final = 4096
_ROWS: Final = 4
_RANDOM_MODEL: Final = {"family": "llama", "layers": 2, "hidden_size": 32, "heads": 2, "seed": 1}


@dataclass(frozen=True)
class SelfCheck:
    """Runs the tiny job."""

    engine: Sequence[str]
    """The command that starts an engine."""
    work_root: Path
    devices: Sequence[Device]
    environment: Callable[[Path], Mapping[str, str]]
    """The environment of an engine whose directory of temporary files is given."""
    timeout_seconds: float
    should_stop: Callable[[], bool] = lambda: False
    """Ends the check without a finding: the worker shuts down."""
    clock: Callable[[], float] = time.monotonic

    def __call__(self) -> str | None:
        """What is wrong with this worker, in one sentence without paths; null where it can run jobs."""
        directory = self.work_root / f"{SCRATCH_PREFIX}check-{uuid.uuid4().hex}"
        try:
            (directory / "tmp").mkdir(mode=0o700, parents=True)
            finding = self._run_tiny_job(directory)
        except OSError as error:
            finding = explain_unwritable(error)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return finding

    def _run_tiny_job(self, directory: Path) -> str | None:
        samples, spec, log = directory / "samples.jsonl", directory / "spec.json", directory / "check.log"
        rows = [{"instruction": f"Say {number}", "output": str(number)} for number in range(_ROWS)]
        samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        spec.write_text(resolve(self._spec(samples)).model_dump_json(), encoding="utf-8")
        (directory / "run").mkdir()
        # Its cache lies in the same directory, so that the one of the jobs stays as it is.
        command = [*self.engine, str(spec), "--workdir", str(directory / "run")]
        try:
            with log.open("wb") as output:
                process = spawn(
                    command,
                    stdout=subprocess.DEVNULL,
                    stderr=output,
                    environment=self.environment(directory / "tmp"),
                    directory=directory,
                )
        except OSError as error:
            return f"The engine cannot be started: {error.strerror}."
        try:
            status = self._wait(process)
        finally:
            kill_group(process)
            process.wait()
        if status == ExitCode.DONE or (status is None and self.should_stop()):
            return None
        _log.error("worker_check_failed", status=status, log=_tail(log))
        if status is None:
            return f"A tiny job did not end within {self.timeout_seconds:g} seconds."
        ended = _last_failure(directory / "run" / EVENTS_FILE)
        if ended is not None:
            return f"A tiny job failed with {ended.code}: {ended.message}"
        if status < 0:
            return f"The engine of a tiny job died by signal {-status}."
        return f"The engine of a tiny job ended with status {status}, before it could say why."

    def _wait(self, process: subprocess.Popen[bytes]) -> int | None:
        """The exit status; null where the time is over or the worker shuts down."""
        deadline = self.clock() + self.timeout_seconds
        while self.clock() < deadline and not self.should_stop():
            try:
                return process.wait(_TICK_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        return None

    def _spec(self, samples: Path) -> dict[str, Any]:
        has_gpu = any(device.kind == "cuda" for device in self.devices)
        return {
            "preset": "quick",
            "teacher": {"random": _RANDOM_MODEL},
            "student": {"from_teacher": {"layers": [0]}},
            "data": {"train": {"path": str(samples)}, "max_length": 64, "max_prompt_length": 48},
            "curriculum": {"stages": 1, "epochs_per_stage": 1, "ranking": {"max_new_tokens": 1}},
            "training": {"batch_size": _ROWS},
            "evaluation": {"max_new_tokens": 1, "max_rows": 1},
            "resources": {"device": "cuda" if has_gpu else "cpu", "threads": 1},
        }


def check_writable(directories: Mapping[str, Path]) -> str | None:
    """Why nothing can be written to one of these directories, in one sentence; null where something can to each.

    Args:
        directories: by the name of the setting that says where they are.
    """
    for setting, directory in directories.items():
        probe = directory / f"{SCRATCH_PREFIX}probe-{uuid.uuid4().hex}"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # More than a block, so that a disk without space is noticed.
            probe.write_bytes(bytes(2**16))
        except OSError as error:
            return explain_unwritable(error, setting)
        finally:
            # Where the directory is a file or read-only there is nothing to remove, and no way to.
            with suppress(OSError):
                probe.unlink()
    return None


def explain_unwritable(error: OSError, setting: str = "POCL_WORK_ROOT") -> str:
    """The sentence about a directory that cannot be written, which names its setting and no path."""
    return f"The directory of {setting} cannot be written: {error.strerror or 'an error of the file system'}."


def _last_failure(events: Path) -> RunEnded | None:
    """How the run ended, by the last of its events; null where it could not say."""
    try:
        lines = events.read_text(encoding="utf-8").splitlines()
        event = from_line(lines[-1]).event if lines else None
    except (OSError, ValueError, ValidationError):
        return None
    return event if isinstance(event, RunEnded) else None


def _tail(log: Path) -> str:
    return log.read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace")
