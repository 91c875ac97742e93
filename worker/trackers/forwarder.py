"""Forwards the metrics of jobs to trackers: one thread and one process for each channel, however many jobs there are.

A tracker's server is the operator's, so one that hangs for a job hangs for all: its channel waits, and nothing else. Of
several schedulers one forwards by a channel at a time.
"""

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import structlog

from domain.artifacts import ArtifactStore
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.jobs.tracker_feed import (
    DueTracker,
    due_trackers,
    later_steps,
    read_points,
    read_results,
    record_failure,
    record_file,
    record_sent,
)
from domain.settings import Settings
from domain.trackers.models import FILE_CHANNELS, TrackerChannel
from domain.workers.repository import take_duty
from worker.scratch_directory import ScratchDirectory
from worker.settings import WorkerSettings
from worker.trackers.client import CannotTrack
from worker.trackers.process import TrackerProcess

_log = structlog.get_logger(__name__)

_MAX_DUE: Final = 50
_MAX_BATCHES: Final = 20
"""How many messages one job gets in a turn while others wait."""
_MAX_OPEN_RUNS: Final = 64
_MAX_WAIT_SECONDS: Final = 600.0
_FILE_GROWTH: Final = 1.25
"""A file is made again once the job has come so much further, so that all files of a job cost a few times the last."""
_INTERRUPT_SECONDS: Final = 10.0
"""How long the end of a scheduler waits for turns that it has interrupted; they may still write a row or a file."""
_JOIN_SECONDS: Final = 0.1
_SERVER_WIDE: Final = frozenset({"tracker_unreachable", "tracker_timed_out", "tracker_refused"})


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def available_channels(
    environ: Mapping[str, str] = os.environ, has_package: Callable[[str], bool] = _is_installed
) -> tuple[TrackerChannel, ...]:
    """The channels whose packages are installed and whose servers the environment names."""
    has_wandb = has_package("wandb")
    channels: dict[TrackerChannel, bool] = {
        "tensorboard": has_package("tensorboardX"),
        "mlflow": bool(environ.get("MLFLOW_TRACKING_URI")) and has_package("mlflow"),
        "wandb": bool(environ.get("WANDB_API_KEY")) and has_wandb,
        "wandb_offline": has_wandb,
    }
    return tuple(channel for channel, is_there in channels.items() if is_there)


@dataclass
class ChannelForwarder:
    """Forwards by one channel."""

    channel: TrackerChannel
    database: Database
    store: ArtifactStore
    scheduler: str
    """The name of this scheduler, unique among them."""
    process: TrackerProcess
    interval_seconds: float
    """How often a running job is sent what is new."""
    timeout_seconds: float
    """How long one answer of the tracker may take."""
    give_up_seconds: float
    """How long a tracker of an ended job may fail before it is given up."""
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random
    _last_steps: dict[str, dict[str, int]] = field(default_factory=dict)
    """By the id of the job whose run is open in the process, the last step of each series that was sent."""
    _waits_until: float = 0.0
    _failures: int = 0
    _is_interrupted: bool = False

    def turn(self) -> int:
        """Send what is due; how many jobs were looked at.

        Raises:
            DatabaseUnavailable: the rows could not be read or written.
        """
        if self.clock() < self._waits_until:
            return 0
        began = self.clock()
        with self.database.transaction(write=False) as session:
            due = due_trackers(session, self.channel, limit=_MAX_DUE)
        if not due:
            if not self._last_steps:
                self.stop()
            return 0
        with self.database.transaction(write=True) as session:
            duty, seconds = f"trackers {self.channel}", 4 * self.timeout_seconds + 60
            is_ours = take_duty(session, duty, self.scheduler, seconds=seconds)
        if not is_ours:
            # Another scheduler has the runs now.
            self.stop()
            return 0
        for count, each in enumerate(due):
            is_over = self.clock() - began > self.timeout_seconds or self._is_interrupted
            if is_over or self.clock() < self._waits_until:
                return count
            self._forward(each)
        return len(due)

    def stop(self) -> None:
        """End the process of the client; what it had not sent is sent from the rows."""
        self.process.kill()
        self._last_steps.clear()

    def interrupt(self) -> None:
        """End the turn that another thread is in: what waits for the tracker fails at once, by no fault of it."""
        self._is_interrupted = True
        self.process.interrupt()

    def _forward(self, due: DueTracker) -> None:
        if self.channel in FILE_CHANNELS and due.held and not self._has_grown(due):
            with self.database.transaction(write=True) as session:
                record_sent(session, due, due.last_steps, complete=False, next_seconds=max(60.0, self.interval_seconds))
            return
        try:
            self._send(due)
            self._failures = 0
        except CannotTrack as error:
            self._fail(due, error)
        except OSError as error:
            _log.error("tracker_file_not_stored", job_id=due.run.job_id, error=str(error))
            self._fail(due, CannotTrack("storage_failed", "Its file could not be stored."))

    def _has_grown(self, due: DueTracker) -> bool:
        sent = max(due.last_steps.values(), default=0)
        return due.step > 0 and due.step >= _FILE_GROWTH * sent

    def _send(self, due: DueTracker) -> None:
        run, makes_file = due.run, self.channel in FILE_CHANNELS
        run_id = run_url = None
        if makes_file:
            # A file is made of all rows: it goes on from none that an earlier process may have left unfinished.
            self._last_steps.pop(run.job_id, None)
            shutil.rmtree(self.process.directory_of(run.job_id))
        if run.job_id not in self._last_steps:
            self._make_room()
            opened = self.process.open(run)
            run_id, run_url = opened.run_id, opened.run_url
            known = due.last_steps if opened.last_steps is None else opened.last_steps
            self._last_steps[run.job_id] = dict(known)
        has_more, batches = True, 0
        while has_more and (makes_file or batches < _MAX_BATCHES):
            with self.database.transaction(write=False) as session:
                points, has_more = read_points(session, run.job_id, self._last_steps[run.job_id])
            if points:
                self.process.send(run.job_id, points)
            batches += 1
            self._last_steps[run.job_id] = later_steps(self._last_steps[run.job_id], points)
            if not makes_file:
                self._record(due, complete=False, run_id=run_id, run_url=run_url, at_once=has_more)
        if not has_more and (makes_file or not due.held):
            self._close(due)
            self._record(due, complete=True)

    def _close(self, due: DueTracker) -> None:
        run = due.run
        with self.database.transaction(write=False) as session:
            results = read_results(session, run.job_id)
        file = self.process.end_run(run.job_id, str(due.status), {**run.tags, **results})
        if file is not None:
            self._store_file(due, file)
            shutil.rmtree(self.process.directory_of(run.job_id), ignore_errors=True)

    def _store_file(self, due: DueTracker, file: Path) -> None:
        # A key of its own for each: a download that has begun is of one file. The host is no client's to know.
        name = f"events.out.tfevents.{int(time.time())}.{due.run.job_id}" if due.kind == "tensorboard" else file.name
        key = f"jobs/{due.run.job_id}/trackers/{due.kind}-{time.time_ns()}/{name}"
        stored = self.store.publish_file(file, key)
        with self.database.transaction(write=True) as session:
            replaced = record_file(session, due, store_key=key, size_bytes=stored.size, sha256=stored.sha256)
        if replaced is not None:
            self.store.remove(replaced)

    def _record(
        self,
        due: DueTracker,
        *,
        complete: bool,
        run_id: str | None = None,
        run_url: str | None = None,
        at_once: bool = False,
    ) -> None:
        job_id = due.run.job_id
        with self.database.transaction(write=True) as session:
            record_sent(
                session,
                due,
                self._last_steps[job_id],
                complete=complete,
                next_seconds=0.0 if at_once else self.interval_seconds,
                run_id=run_id,
                run_url=run_url,
            )
        if complete:
            del self._last_steps[job_id]

    def _make_room(self) -> None:
        """Let go of the run that was opened first, where there are too many: it is opened again when it is due."""
        if len(self._last_steps) >= _MAX_OPEN_RUNS:
            job_id = next(iter(self._last_steps))
            del self._last_steps[job_id]
            self.process.end_run(job_id, "running", {})

    def _fail(self, due: DueTracker, error: CannotTrack) -> None:
        if self._is_interrupted:
            # It is this scheduler that ends: the next goes on from the rows.
            return
        _log.warning("tracker_failed", job_id=due.run.job_id, channel=self.channel, code=error.code)
        self._last_steps.pop(due.run.job_id, None)
        if self.process.pid is None:
            self._last_steps.clear()
        with self.database.transaction(write=True) as session:
            record_failure(
                session,
                due,
                error.code,
                error.message,
                wait_seconds=self._wait(due.failures),
                give_up_seconds=self.give_up_seconds,
            )
        if error.code in _SERVER_WIDE:
            self._waits_until = self.clock() + self._wait(self._failures)
            self._failures += 1

    def _wait(self, failures: int) -> float:
        seconds: float = min(_MAX_WAIT_SECONDS, self.interval_seconds * 2.0 ** min(failures, 20))
        return seconds * (0.5 + self.jitter() / 2)


@dataclass
class TrackerForwarder:
    """The channels of one scheduler, each in a thread of its own."""

    channels: tuple[ChannelForwarder, ...]
    scratch: ScratchDirectory | None = None
    """Where the clients keep files."""
    grace_seconds: float = 5.0
    """How long :meth:`close` waits for messages that are under way."""
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def names(self) -> tuple[TrackerChannel, ...]:
        """The channels that this scheduler can forward by."""
        return tuple(each.channel for each in self.channels)

    def start(self) -> None:
        self._threads += [
            threading.Thread(target=self._run, args=(each,), name=f"tracker-{each.channel}", daemon=True)
            for each in self.channels
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop after the messages that are under way, or without them where a tracker does not answer in time."""
        self._stopping.set()
        deadline = time.monotonic() + self.grace_seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        deadline = time.monotonic() + _INTERRUPT_SECONDS
        while hanging := [thread.name for thread in self._threads if thread.is_alive()]:
            if time.monotonic() > deadline:
                # These threads end with this process; the next scheduler removes the files.
                _log.error("trackers_not_stopped", threads=hanging)
                return
            for channel in self.channels:
                channel.interrupt()
            for thread in self._threads:
                thread.join(_JOIN_SECONDS)
        if self.scratch is not None:
            self.scratch.remove()

    def _run(self, forwarder: ChannelForwarder) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    forwarder.turn()
                except DatabaseUnavailable as error:
                    _log.warning("database_unavailable", error=str(error))
                except Exception:  # noqa: BLE001 - whatever it is, the next turn goes on from the rows
                    _log.exception("tracker_turn_failed", channel=forwarder.channel)
                    forwarder.stop()
                self._stopping.wait(min(forwarder.interval_seconds, 5.0))
        finally:
            forwarder.stop()


def create_forwarder(
    database: Database, store: ArtifactStore, settings: Settings, options: WorkerSettings, scheduler: str
) -> TrackerForwarder:
    """The forwarder that settings and environment describe."""
    channels = available_channels()
    scratch = ScratchDirectory.make(settings.home / "trackers") if channels else None

    def forwarder(channel: TrackerChannel) -> ChannelForwarder:
        assert scratch is not None
        process = TrackerProcess(channel, scratch.path / channel, timeout_seconds=options.tracker_timeout_seconds)
        return ChannelForwarder(
            channel,
            database,
            store,
            scheduler,
            process,
            interval_seconds=options.tracker_seconds,
            timeout_seconds=options.tracker_timeout_seconds,
            give_up_seconds=options.tracker_give_up_days * 86_400,
        )

    return TrackerForwarder(tuple(forwarder(channel) for channel in channels), scratch)
