"""Workers, schedulers and launchers as processes of their own, none of which outlives its test."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tests.support.waiting import eventually
from worker.processes import spawn, terminate

Role = Literal["run", "scheduler", "serve"]


class Processes:
    """Starts processes, and kills all that it started."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._logs.mkdir(parents=True)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, role: Role, environment: Mapping[str, str], *arguments: str) -> "ProcessHandle":
        """Start `python -m worker ROLE`."""
        log = self._logs / f"{len(self._processes)}-{role}.log"
        with log.open("wb") as output:
            process = spawn([sys.executable, "-m", "worker", role, *arguments], stdout=output, environment=environment)
        self._processes.append(process)
        return ProcessHandle(process, log)

    def kill_all(self) -> None:
        for process in self._processes:
            terminate(process, grace=0)


@contextmanager
def terminal_signals(disposition: signal.Handlers) -> Iterator[None]:
    """Processes that are started in this block inherit what a closed terminal (SIGHUP) and Ctrl-C (SIGINT) do to them.

    Args:
        disposition: SIG_IGN, as `nohup` and the `&` of a script have it, or SIG_DFL; without this block it is that of
            the whole run.
    """
    before = {number: signal.signal(number, disposition) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignores(pid: int, *numbers: signal.Signals) -> bool:
    """Whether a process ignores these signals, as the kernel has it."""
    (mask,) = [
        int(line.partition(":")[2], 16)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("SigIgn:")
    ]
    return all(mask >> (number - 1) & 1 for number in numbers)


class ProcessHandle:
    """A process and its log."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for_log(self, text: str, within: float = 60) -> str:
        """The first line of the log that contains `text`, once there is one."""

        def matching_line() -> str:
            line = next((line for line in self.log.splitlines() if text in line), "")
            assert line or self.process.poll() is None, f"the process exited: {self.log[-2000:]}"
            return line

        return eventually(matching_line, within=within, what=f"{text!r} in {self._log.name}")

    def wait_for_exit(self, within: float = 60) -> int:
        """Wait until the process exits; the exit status."""
        eventually(lambda: self.process.poll() is not None, within=within, what="the process exits")
        return self.process.wait()
