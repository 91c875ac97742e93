"""Thousands of simulated workers: each action of a worker is the transaction that a real one would make."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

from domain.db import Database
from domain.jobs.event_recorder import apply_events
from domain.jobs.leases import Claim, claim_next, heartbeat, settle
from domain.jobs.states import AttemptOutcome
from domain.settings import Settings
from domain.workers.models import Device
from domain.workers.repository import register_worker
from pocl.events import EventEnvelope, StepLogged
from worker.settings import WorkerSettings

_DEVICE = Device("cuda", "simulated", 80 << 30, "GPU-simulated")
_STEPS_PER_BATCH = 20
_LEASE_SECONDS = 24 * 3600.0
"""Leases outlast the run: heartbeats are as many as are measured."""


@dataclass
class Timings:
    """What a number of actions took."""

    seconds: list[float] = field(default_factory=list)
    """Of each action."""
    elapsed: float = 0.0
    """From the first to the last."""

    @property
    def per_second(self) -> float:
        return len(self.seconds) / self.elapsed if self.elapsed else 0.0

    def quantile_ms(self, share: float) -> float | None:
        """The time within which a share of the actions was done."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000 if ordered else None


def closed_loop(action: Callable[[int], object], clients: int, *, count: int | None, seconds: float) -> Timings:
    """Have so many clients repeat an action, each as soon as its last one is done.

    Args:
        action: gets the number of the call, counted from 0 over all clients.
        count: how many actions at most; null: as many as there is time for.
        seconds: how long at most.
    """
    timings, lock, begun = Timings(), threading.Lock(), time.monotonic()
    numbers = iter(range(count) if count is not None else range(1 << 62))

    def client() -> None:
        while time.monotonic() - begun < seconds:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            start = time.monotonic()
            action(number)
            took = time.monotonic() - start
            with lock:
                timings.seconds.append(took)

    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client) for _ in range(clients)]:
            done.result()
    timings.elapsed = time.monotonic() - begun
    return timings


class Fleet:
    """Workers that are registered, and the jobs that they hold."""

    def __init__(self, database: Database, workers: int, clients: int) -> None:
        self._database = database
        self._clients = clients
        self._workers = [f"simulated-{number}" for number in range(workers)]
        self._held: list[Claim] = []
        self._steps = 0

    def register(self, seconds: float) -> Timings:
        """Heartbeats of the workers' processes."""
        return closed_loop(self._register, self._clients, count=None, seconds=seconds)

    def register_all(self) -> None:
        closed_loop(self._register, self._clients, count=len(self._workers), seconds=3600)

    def claim(self, seconds: float) -> Timings:
        """Claims, until each worker holds a job."""
        return closed_loop(self._claim, self._clients, count=len(self._workers), seconds=seconds)

    def heartbeat(self, seconds: float) -> Timings:
        """Renewals of leases."""
        return closed_loop(self._heartbeat, self._clients, count=None, seconds=seconds)

    def report(self, seconds: float) -> Timings:
        """Batches of engine events."""
        return closed_loop(self._report, self._clients, count=None, seconds=seconds)

    def work(self, seconds: float, job_seconds: float) -> Timings:
        """All of it in the proportion in which a worker does it, whose jobs take `job_seconds` each."""
        options, settings = WorkerSettings(), Settings()
        rates = {
            self._register: 1 / settings.heartbeat_seconds,
            self._heartbeat: 1 / settings.heartbeat_seconds,
            self._report: 1 / options.flush_seconds,
            self._replace: 1 / job_seconds,
        }
        chooser = random.Random(0)
        chosen = chooser.choices(list(rates), list(rates.values()), k=100_000)
        return closed_loop(
            lambda number: chosen[number % len(chosen)](number), self._clients, count=None, seconds=seconds
        )

    @staticmethod
    def actions_per_second(job_seconds: float) -> float:
        """How many actions one worker makes a second."""
        options, settings = WorkerSettings(), Settings()
        return 2 / settings.heartbeat_seconds + 1 / options.flush_seconds + 1 / job_seconds

    def _register(self, number: int) -> None:
        with self._database.transaction(write=True) as session:
            register_worker(session, self._workers[number % len(self._workers)], [_DEVICE])

    def _claim(self, number: int) -> None:
        worker = self._workers[number % len(self._workers)]
        with self._database.transaction(write=True) as session:
            held = claim_next(session, worker=worker, lease_seconds=_LEASE_SECONDS, memory={"cuda": 80 << 30})
        if held is not None:
            self._held.append(held)

    def _heartbeat(self, number: int) -> None:
        with self._database.transaction(write=True) as session:
            heartbeat(session, self._held[number % len(self._held)], _LEASE_SECONDS)

    def _report(self, number: int) -> None:
        self._steps += 1
        first = self._steps * _STEPS_PER_BATCH
        events = [_step(first + index) for index in range(_STEPS_PER_BATCH)]
        with self._database.transaction(write=True) as session:
            apply_events(session, self._held[number % len(self._held)], events, offset=first * 500)

    def _replace(self, number: int) -> None:
        """End a job well, and claim the next."""
        ended = self._held.pop(0)
        with self._database.transaction(write=True) as session:
            settle(session, ended, AttemptOutcome.succeeded())
        self._claim(number)


def _step(step: int) -> EventEnvelope:
    event = StepLogged(
        step=step, total_steps=1 << 30, stage=0, loss=1.0, cross_entropy=2.0, divergence=0.5, learning_rate=1e-4,
        grad_norm=1.0, temperature=1.5, kd_weight=0.5, tokens=1000, tokens_seen=step * 1000, tokens_per_second=1e4,
        eta_seconds=3600.0,
    )  # fmt: skip
    return EventEnvelope(at=datetime.now(UTC), event=event)
