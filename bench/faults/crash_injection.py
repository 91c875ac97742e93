"""Crash injection: a run is crashed at chosen points and started again each time, until it has finished.

The run is the command `python -m pocl run`, as a process that SIGKILL or SIGTERM ends. So that hundreds of
crashes are affordable, its process is by default forked from a server that has imported torch already.
"""

import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from bench.faults.outcome import read_events, scratch_paths
from pocl.layout import EVENTS_FILE, ExitCode

STARTING = "starting"
"""The phase before the first one that the engine names."""
_PRELOADED = [
    "pocl.__main__", "pocl.run", "accelerate",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
]  # fmt: skip
_MAX_DELAY_SECONDS = 0.01
_POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class CrashPoint:
    """When to crash a run: at an event, optionally once a save is under way, and after a delay."""

    events: int
    """This many events after the start, or after `phase` began."""
    phase: str | None = None
    in_save: bool = False
    """Whether to wait until a half-written file or directory appears."""
    delay: float = 0.0
    """Seconds that pass before the signal is sent."""
    kill_signal: signal.Signals = signal.SIGKILL


@dataclass(frozen=True)
class Crash:
    """An attempt that was ended by a signal."""

    kill_signal: signal.Signals
    phase: str
    in_save: bool
    """Whether it left a half-written file or directory."""
    lost_steps: int = 0
    """Optimiser steps that had to be run again."""


class Attempt(Protocol):
    """A process of a run."""

    events: int
    """File descriptor from which its events can be read."""

    def send(self, number: signal.Signals) -> None: ...

    def wait(self) -> int:
        """Its exit status, negative for a signal."""
        ...


class Engine(Protocol):
    """How attempts are started."""

    def start(self, spec: Path, workdir: Path) -> Attempt: ...


class CommandEngine:
    """Starts each attempt as a new command."""

    def start(self, spec: Path, workdir: Path) -> Attempt:
        with _log_beside(workdir) as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "pocl", *_arguments(spec, workdir)], stdout=subprocess.PIPE, stderr=log
            )
        return _CommandAttempt(process)


class ForkedEngine:
    """Starts each attempt as the command's `main` in a fork of a server that has imported torch, but not used it."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)

    def start(self, spec: Path, workdir: Path) -> Attempt:
        reader, writer = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_child, args=(_arguments(spec, workdir), writer, workdir))
        process.start()
        writer.close()
        return _ForkedAttempt(process, reader)


def run_with_crashes(engine: Engine, spec: Path, workdir: Path, crash_points: Sequence[CrashPoint]) -> list[Crash]:
    """Run `spec` in `workdir` to its end, crash it at each of `crash_points` in turn, and start it again each time.

    The crash points that are left when an attempt finishes the run are not used.

    Raises:
        RuntimeError: an attempt ended neither well nor by its crash.
    """
    crashes: list[Crash] = []
    position = 0
    for crash_point in [*crash_points, None]:
        result = _attempt(engine, spec, workdir, crash_point)
        for started in (event for event in result.events if event["type"] == "run_started"):
            resumed = started["resumed_from_step"] or 0
            if crashes:
                crashes[-1] = replace(crashes[-1], lost_steps=position - resumed)
            position = resumed
        position = max([position, *(event["step"] for event in result.events if event["type"] == "step")])
        if result.status == 0:
            return crashes
        if crash_point is None or result.status not in (-crash_point.kill_signal, ExitCode.STOPPED):
            raise RuntimeError(f"the run in {workdir} exited with {result.status}: {_last_lines(workdir)}")
        crashes.append(Crash(crash_point.kill_signal, result.phase, result.in_save))
    raise AssertionError("the last attempt is not crashed")


def draw_crash_points(rng: random.Random, count: int, baseline: Sequence[dict[str, Any]]) -> list[CrashPoint]:
    """Random crash points, spread over the phases, events and saves of a run without crashes."""
    phases = sorted({event["phase"] for event in baseline if event["type"] == "phase"})
    crash_points = []
    for _ in range(count):
        delay = rng.random() * _MAX_DELAY_SECONDS
        kill_signal = signal.SIGTERM if rng.random() < 0.15 else signal.SIGKILL
        kind = rng.choice(["event", "event", "phase", "save"])
        if kind == "phase":
            crash_points.append(
                CrashPoint(rng.randint(0, 3), phase=rng.choice(phases), delay=delay, kill_signal=kill_signal)
            )
        else:
            # Early events are likelier, since an attempt that continues a run has fewer events.
            events = int(len(baseline) * rng.random() ** 2)
            crash_points.append(CrashPoint(events, in_save=kind == "save", delay=delay, kill_signal=kill_signal))
    return crash_points


@dataclass(frozen=True)
class _AttemptResult:
    """How an attempt exited, and the events that it wrote."""

    status: int
    events: list[dict[str, Any]]
    in_save: bool

    @property
    def phase(self) -> str:
        phases = (str(event["phase"]) for event in reversed(self.events) if event["type"] == "phase")
        return next(phases, STARTING)


def _attempt(engine: Engine, spec: Path, workdir: Path, crash_point: CrashPoint | None) -> _AttemptResult:
    offset, scratch_before = _size_of_log(workdir), scratch_paths(workdir)

    def is_writing() -> bool:
        # Scratch of earlier attempts does not count.
        return bool(scratch_paths(workdir) - scratch_before)

    attempt = engine.start(spec, workdir)
    _follow(attempt, crash_point, is_writing)
    status = attempt.wait()
    return _AttemptResult(status, read_events(workdir, offset), is_writing())


def _child(arguments: list[str], events: Connection, workdir: Path) -> None:
    os.dup2(events.fileno(), 1)
    with _log_beside(workdir) as log:
        os.dup2(log.fileno(), 2)
    from pocl.__main__ import main

    sys.exit(main(arguments))


class _CommandAttempt:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None  # It is a pipe.
        self._process = process
        self.events = process.stdout.fileno()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        with self._process:
            return self._process.wait()


class _ForkedAttempt:
    def __init__(self, process: multiprocessing.process.BaseProcess, events: Connection) -> None:
        self._process = process
        self._events = events
        self.events = events.fileno()

    def send(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def wait(self) -> int:
        self._process.join()
        status = self._process.exitcode
        self._events.close()
        self._process.close()
        assert status is not None  # It was joined.
        return status


def _follow(attempt: Attempt, crash_point: CrashPoint | None, is_writing: Callable[[], bool]) -> None:
    """Read events until the attempt exits, and send the signal at the crash point."""
    counter = _EventCounter(crash_point)
    sent = crash_point is None
    while True:
        waiting = not sent and counter.is_reached
        if crash_point is not None and waiting and (not crash_point.in_save or is_writing()):
            time.sleep(crash_point.delay)
            attempt.send(crash_point.kill_signal)
            sent = True
            continue
        ready, _, _ = select.select([attempt.events], [], [], _POLL_SECONDS if waiting else None)
        if ready:
            chunk = os.read(attempt.events, 1 << 16)
            if not chunk:
                return
            counter.add(chunk)


class _EventCounter:
    """Counts events as they arrive through a pipe, in chunks of any size."""

    def __init__(self, crash_point: CrashPoint | None) -> None:
        self._crash_point = crash_point
        self._counting = crash_point is None or crash_point.phase is None
        self._count = 0
        self._partial_line = b""

    @property
    def is_reached(self) -> bool:
        return self._crash_point is not None and self._counting and self._count >= self._crash_point.events

    def add(self, chunk: bytes) -> None:
        *lines, self._partial_line = (self._partial_line + chunk).split(b"\n")
        for line in lines:
            if self._counting:
                self._count += 1
            elif self._crash_point is not None and f'"phase":"{self._crash_point.phase}"'.encode() in line:
                self._counting = True


def _arguments(spec: Path, workdir: Path) -> list[str]:
    return ["run", str(spec), "--workdir", str(workdir)]


def _size_of_log(workdir: Path) -> int:
    path = workdir / EVENTS_FILE
    # The next attempt cuts off a torn line.
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _log_beside(workdir: Path) -> Any:
    return workdir.with_suffix(".stderr").open("ab")


def _last_lines(workdir: Path) -> str:
    return workdir.with_suffix(".stderr").read_text(encoding="utf-8", errors="replace")[-2000:]
