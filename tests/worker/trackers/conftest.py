"""A job with trackers, whose rows are written as a worker would write them, and forwarders of it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from domain.db import db_now
from domain.jobs.job_options import JobOptions
from domain.jobs.leases import Claim
from domain.trackers.models import JobTracker, TrackerChannel
from domain.trackers.repository import parse_trackers
from domain.workers.repository import record_scheduler
from pocl import events as engine
from tests.support.harness import ServiceHarness
from tests.support.rows import envelopes, evaluated, stage_started, step_logged
from tests.support.worker_actions import claim_queued_job, write_events
from worker.trackers.forwarder import ChannelForwarder
from worker.trackers.process import TrackerProcess

CHANNELS: tuple[TrackerChannel, ...] = ("tensorboard", "mlflow", "wandb", "wandb_offline")


class TrackedJobs:
    """Jobs with trackers in one service, and forwarders that send what their rows have."""

    def __init__(self, harness: ServiceHarness, directory: Path) -> None:
        self.harness = harness
        self.directory = directory
        self.now = 0.0
        self.forwarders: list[ChannelForwarder] = []
        self._offset = 0
        with harness.database.transaction(write=True) as session:
            record_scheduler(session, "s1", reaches_broker=True, trackers=CHANNELS)

    def submit(self, *trackers: dict[str, Any]) -> str:
        return self.harness.submit(JobOptions(name="tracked", trackers=parse_trackers(trackers)))

    def train(self, claim: Claim, first: int, last: int, *more: engine.Event) -> None:
        """Record the steps of an attempt, both inclusive, each of which has another loss."""
        events: list[engine.Event] = []
        for step in range(first, last + 1):
            if step == 1:
                events.append(evaluated(subject="initial", stage=None, step=0))
            if step in (1, 11):
                events.append(stage_started(step // 10))
            events.append(step_logged(step, loss=10.0 / step))
        self._offset += 1000
        write_events(self.harness.database, claim, envelopes(*events, *more), offset=self._offset)

    def claim(self) -> Claim:
        self._offset = 0
        return claim_queued_job(self.harness.database)

    def forwarder(
        self, channel: TrackerChannel, process: TrackerProcess | None = None, *, name: str = "s1", **environ: str
    ) -> ChannelForwarder:
        """A forwarder by a client in a process of its own, or by `process` in its place."""
        directory = self.directory / f"{name}-{channel}-{len(self.forwarders)}"
        all_variables = {**os.environ, **environ}
        forwarder = ChannelForwarder(
            channel,
            self.harness.database,
            self.harness.store,
            name,
            process or TrackerProcess(channel, directory, timeout_seconds=200, environ=all_variables),
            interval_seconds=1,
            timeout_seconds=200,
            give_up_seconds=3600,
            clock=lambda: self.now,
            jitter=lambda: 1.0,
        )
        self.forwarders.append(forwarder)
        return forwarder

    def turn(self, forwarder: ChannelForwarder) -> int:
        """A turn at a moment when everything is due."""
        self.now += 10_000
        with self.harness.database.transaction(write=True) as session:
            session.execute(sa.update(JobTracker).values(due_at=db_now(-1)))
        return forwarder.turn()

    def row(self, job_id: str) -> JobTracker:
        with self.harness.database.transaction(write=False) as session:
            return session.scalars(sa.select(JobTracker).where(JobTracker.job_id == job_id)).one()


@pytest.fixture
def tracked_jobs(tmp_path: Path) -> Iterator[Callable[[str], TrackedJobs]]:
    """Makes them over the database of a URL."""
    made: list[TrackedJobs] = []

    def make(database_url: str) -> TrackedJobs:
        jobs = TrackedJobs(ServiceHarness(tmp_path / "home", database_url), tmp_path / "trackers")
        made.append(jobs)
        return jobs

    yield make
    for jobs in made:
        for forwarder in jobs.forwarders:
            forwarder.stop()
        jobs.harness.close()


@pytest.fixture
def tracked(tracked_jobs: Callable[[str], TrackedJobs], database_url: str) -> TrackedJobs:
    """On SQLite and on PostgreSQL."""
    return tracked_jobs(database_url)
