"""The parts of a service in one process, with an engine that trains nothing."""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from domain.artifact_stores import open_artifact_store
from domain.artifacts import ArtifactStore
from domain.checkpoints.models import Checkpoint
from domain.checkpoints.repository import list_checkpoints
from domain.datasets.repository import add_dataset
from domain.db import Database
from domain.ids import new_id
from domain.jobs import repository
from domain.jobs.actions import cancel_job
from domain.jobs.engine_logs import read_log
from domain.jobs.job_options import JobOptions
from domain.jobs.models import Job, JobArtifact, JobAttempt, JobEvent
from domain.jobs.submission import submit_job
from domain.process_stat import PARENT, read_stat
from domain.settings import Settings
from domain.workers.models import Device
from worker.devices import detect_devices
from worker.settings import WorkerSettings
from worker.supervisor import Supervisor

FAKE_ENGINE = Path(__file__).parents[1] / "worker" / "fake_engine.py"
PROJECT = "default"
SPEC: dict[str, Any] = {
    "preset": "quick",
    "teacher": {"random": {"layers": 4}},
    "student": {"from_teacher": {"layers": [0, 3]}},
    "curriculum": {"stages": 2},
}


@dataclass(frozen=True)
class ServiceHarness:
    """A home with a database, an artifact store and jobs, and supervisors that run the fake engine."""

    home: Path
    database_url: str
    lease_seconds: float = 60
    heartbeat_seconds: float | None = None
    """Of workers, and the time between two turns of the scheduler; by default a sixth of the lease."""
    retry_seconds: float = 0
    """Of the settings: by default a job that failed may be tried again at once."""
    redis_url: str | None = None
    artifact_store: str | None = None
    """Of the settings: a bucket; by default the store is below `home`."""
    hub_publish_to: tuple[str, ...] = ()
    """Of the settings: the owners of repositories that students may be pushed to."""
    databases: list[Database] = field(default_factory=list)

    @cached_property
    def settings(self) -> Settings:
        heartbeat_seconds = self.heartbeat_seconds or self.lease_seconds / 6
        return Settings(
            home=self.home,
            database_url=self.database_url,
            redis_url=self.redis_url,
            artifact_store=self.artifact_store,
            hub_publish_to=self.hub_publish_to,
            lease_seconds=self.lease_seconds,
            heartbeat_seconds=heartbeat_seconds,
            reaper_seconds=heartbeat_seconds,
            retry_seconds=self.retry_seconds,
        )

    @cached_property
    def database(self) -> Database:
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = Database(self.database_url)
        self.databases.append(database)
        return database

    @cached_property
    def store(self) -> ArtifactStore:
        return open_artifact_store(self.settings)

    def close(self) -> None:
        for database in self.databases:
            database.close()

    def submit(self, options: JobOptions | None = None, **changes: Any) -> str:
        """Submit a job with a data set of its own; its id."""
        dataset = new_id("ds")
        self.home.mkdir(exist_ok=True)
        samples = self.home / "samples.jsonl"
        samples.write_text("".join(json.dumps({"instruction": f"Say {n}", "output": str(n)}) + "\n" for n in range(8)))
        stored = self.store.publish_file(samples, f"datasets/{dataset}.jsonl")
        with self.database.transaction(write=True) as session:
            add_dataset(
                session,
                project=PROJECT,
                name="numbers",
                rows=8,
                size_bytes=stored.size,
                sha256=stored.sha256,
                store_key=f"datasets/{dataset}.jsonl",
                dataset_id=dataset,
            )
        raw = {**SPEC, "data": {"train": {"dataset": dataset}}, **changes}
        return submit_job(self.database, self.settings, raw, project=PROJECT, options=options).id

    def cancel(self, job_id: str) -> None:
        with self.database.transaction(write=True) as session:
            cancel_job(session, PROJECT, job_id)

    def job(self, job_id: str) -> Job:
        with self.database.transaction(write=False) as session:
            return repository.get_job(session, PROJECT, job_id)

    def attempts(self, job_id: str) -> Sequence[JobAttempt]:
        with self.database.transaction(write=False) as session:
            return repository.list_attempts(session, job_id, limit=100).rows

    def log(self, job_id: str, attempt: int = 1) -> str:
        """What is kept of the log of an attempt."""
        with self.database.transaction(write=False) as session:
            row = session.get_one(JobAttempt, (job_id, attempt))
            return read_log(session, row, offset=0, limit=1 << 30).content.decode()

    def events(self, job_id: str, kind: str | None = None) -> list[JobEvent]:
        with self.database.transaction(write=False) as session:
            rows = repository.list_events(session, job_id, limit=10_000).rows
        return [row for row in rows if kind in (None, row.type)]

    def status_history(self, job_id: str) -> list[str]:
        """The statuses of the job in order."""
        return [str(event.data["to"]) for event in self.events(job_id, "status")]

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """The checkpoints of the job, oldest first."""
        with self.database.transaction(write=False) as session:
            return list(reversed(list_checkpoints(session, PROJECT, job_id=job_id, limit=100).rows))

    def artifacts(self, job_id: str) -> dict[str, JobArtifact]:
        with self.database.transaction(write=False) as session:
            rows = session.scalars(sa.select(JobArtifact).where(JobArtifact.job_id == job_id))
            return {row.kind: row for row in rows}

    def options(self, *engine: str, **changes: Any) -> WorkerSettings:
        return WorkerSettings(**{**self._fast_options(engine), **changes})

    def supervisor(
        self,
        *engine: str,
        should_stop: Callable[[], bool] = lambda: False,
        devices: Sequence[Device] | None = None,
        name: str = "tester",
        check: Callable[[], str | None] | None = lambda: None,
        **changes: Any,
    ) -> Supervisor:
        """A supervisor whose engine is the fake one with these arguments.

        Args:
            check: What it finds wrong with itself; None for the real check, by a tiny job of the same engine.
        """
        options = self.options(*engine, **changes)
        devices = detect_devices(options) if devices is None else devices
        return Supervisor(self.database, self.store, self.settings, options, name, devices, should_stop, check=check)

    def environment(self, *engine: str, **changes: Any) -> dict[str, str]:
        """The environment of a worker or a scheduler as a process of its own."""
        options = {
            f"POCL_WORKER_{name}".upper(): value for name, value in {**self._fast_options(engine), **changes}.items()
        }
        settings = self.settings
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("POCL_")},
            **{name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()},
            "POCL_HOME": str(self.home),
            "POCL_DATABASE_URL": settings.database_url,
            **({} if self.redis_url is None else {"POCL_REDIS_URL": self.redis_url}),
            "POCL_LEASE_SECONDS": str(settings.lease_seconds),
            "POCL_HEARTBEAT_SECONDS": str(settings.heartbeat_seconds),
            "POCL_REAPER_SECONDS": str(settings.reaper_seconds),
            "POCL_RETRY_SECONDS": str(settings.retry_seconds),
            "OMP_NUM_THREADS": "1",
        }

    @staticmethod
    def _fast_options(engine: Sequence[str]) -> dict[str, Any]:
        command = [sys.executable, str(FAKE_ENGINE), *engine]
        fast = {"tick_seconds": 0.02, "flush_seconds": 0.05, "doorbell_seconds": 0.05, "leader_seconds": 2}
        return {"engine": command, **fast}


def processes_mentioning(text: str) -> dict[int, str]:
    """The command lines of live processes, except this one, that have `text` in them or in their environment; by id.

    A worker shows its environment to nobody: it counts where its parent does.
    """
    commands: dict[int, str] = {}
    hidden: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            parent = read_stat(entry.name, PARENT)
            hidden[int(entry.name)] = parent, command.replace(b"\0", b" ").decode(errors="replace")
            is_mentioned = text.encode() in command + (entry / "environ").read_bytes()
            del hidden[int(entry.name)]
        except PermissionError:
            continue
        except (FileNotFoundError, ProcessLookupError):
            hidden.pop(int(entry.name), None)
            continue
        # A zombie, which has exited, has no command line left.
        if is_mentioned and command:
            commands[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
    while children := {each: command for each, (parent, command) in hidden.items() if command and parent in commands}:
        commands |= children
        hidden = {each: found for each, found in hidden.items() if each not in children}
    return commands


def kill(process: int, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(process, number)
