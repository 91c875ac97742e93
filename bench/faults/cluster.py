"""The processes of a service into which faults are injected: a broker, a scheduler, two workers.

Each worker runs its engines by way of :mod:`bench.faults.sick_engine`, which can be told to fail.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import redis
import sqlalchemy as sa

from bench.faults import small_disk
from bench.faults.small_runs import spec_and_samples
from domain.artifacts import ArtifactStore
from domain.datasets.repository import add_dataset
from domain.db import Database
from domain.errors import ApiError
from domain.ids import new_id
from domain.jobs import actions
from domain.jobs.models import Job
from domain.jobs.states import HELD, TERMINAL, JobStatus
from domain.jobs.submission import submit_job
from domain.schema import upgrade
from domain.settings import Settings
from worker import valkey
from worker.processes import spawn, terminate

PROJECT: Final = "default"
LEASE_SECONDS: Final = 4.0
_WORKERS: Final = ("worker-1", "worker-2")
_HEARTBEAT_SECONDS: Final = LEASE_SECONDS / 6
_GRACE_SECONDS: Final = 20.0
_STALL_SECONDS: Final = 30.0
"""Longer than an engine takes to start on a busy machine."""
_SICK_ENGINE: Final = Path(__file__).with_name("sick_engine.py")
_SICK_SECONDS: Final = 20.0
_CLOCK_STEP_SECONDS: Final = 3600
_CUT_ALL: Final = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
_CUT_OTHERS: Final = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)
_STEPPED_CLOCK: Final = "stepped_clock"
"""The schema with the function that takes the place of PostgreSQL's clock once the clock was set."""


@dataclass
class Cluster:
    """A service as processes of its own, its database and store, and the faults that can be injected."""

    settings: Settings
    database: Database
    store: ArtifactStore
    away_seconds: float
    """How long the database is away, where that is the fault."""
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    resume_timers: list[threading.Timer] = field(default_factory=list)
    """Resume frozen processes and heal sick workers. They are threads, since a frozen process may hold the lock that
    this one waits for."""
    submitted: dict[str, str] = field(default_factory=dict)
    """The variant of each submitted job, by its id."""

    @classmethod
    def create(cls, home: Path, database_url: str | None, away_seconds: float) -> "Cluster":
        home.mkdir(parents=True)
        settings = Settings(
            home=home,
            database_url=database_url or f"sqlite:///{home / 'pocl.sqlite3'}",
            redis_url=f"unix://{home / 'broker.sock'}",
            lease_seconds=LEASE_SECONDS,
            heartbeat_seconds=_HEARTBEAT_SECONDS,
            reaper_seconds=_HEARTBEAT_SECONDS,
            max_attempts=50,
            max_failures=500,
            retry_seconds=0.5,
            max_retry_seconds=4,
        )
        upgrade(settings)
        return cls(settings, Database(settings.database_url), ArtifactStore(settings.artifact_root), away_seconds)

    def start(self) -> None:
        for name in ("broker", "scheduler", *_WORKERS):
            self._start(name)

    def supervise(self, until: float) -> None:
        """Restart processes that have exited, until a moment of the monotonic clock."""
        while True:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    self._start(name)
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(0.1, left))

    def shut_down(self) -> list[str]:
        """End all processes; one sentence for each that is left nevertheless."""
        for timer in self.resume_timers:
            timer.join()
        for name in (*_WORKERS, "scheduler", "broker"):
            if name in self.processes:
                terminate(self.processes[name], _GRACE_SECONDS)
        self.database.close()
        return [
            f"process {each.pid} is left over: {' '.join(each.cmdline())[:80]}" for each in self._processes_of_home()
        ]

    # --- Jobs ---------------------------------------------------------------------------------------------

    def submit(self, variant: str) -> str:
        raw, *parts = spec_and_samples(variant)
        for name, samples in zip(("train", "validation"), parts, strict=True):
            raw["data"][name] = {"dataset": self._upload(samples)}
        job = submit_job(self.database, self.settings, raw, project=PROJECT)
        self.submitted[job.id] = variant
        return job.id

    def count_queued(self) -> int:
        return len(self._jobs_in(JobStatus.QUEUED))

    def count_live(self) -> int:
        """Jobs that have not ended."""
        return len(self._jobs_in(*(status for status in JobStatus if status not in TERMINAL)))

    def cancel_random_job(self, rng: random.Random) -> bool:
        return self._act(rng, [JobStatus.QUEUED, *HELD], lambda session, job: actions.cancel_job(session, PROJECT, job))

    def pause_random_job(self, rng: random.Random) -> bool:
        """Pause a running job now or at the end of its stage, after resuming those that are paused."""
        self.resume_all()
        at: Any = rng.choice(["now", "stage_end"])
        running = [JobStatus.PREPARING, JobStatus.RUNNING]
        return self._act(rng, running, lambda session, job: actions.pause_job(session, PROJECT, job, at))

    def resume_all(self) -> None:
        for job in self._jobs_in(JobStatus.PAUSED):
            with suppress(ApiError), self.database.transaction(write=True) as session:
                actions.resume_job(session, PROJECT, job)

    def _act(self, rng: random.Random, statuses: Any, act: Any) -> bool:
        jobs = self._jobs_in(*statuses)
        if not jobs:
            return False
        try:
            with self.database.transaction(write=True) as session:
                act(session, rng.choice(jobs))
        except ApiError:
            # Its status changed meanwhile.
            return False
        return True

    def _jobs_in(self, *statuses: JobStatus) -> list[str]:
        with self.database.transaction(write=False) as session:
            return list(session.scalars(sa.select(Job.id).where(Job.status.in_(statuses)).order_by(Job.id)))

    def _upload(self, samples: str) -> str:
        dataset = new_id("ds")
        source = self.settings.home / f"{dataset}.jsonl"
        source.write_text(samples, encoding="utf-8")
        stored = self.store.publish_file(source, f"datasets/{dataset}.jsonl")
        source.unlink()
        with self.database.transaction(write=True) as session:
            add_dataset(
                session,
                project=PROJECT,
                name=dataset,
                rows=samples.count("\n"),
                size_bytes=stored.size,
                sha256=stored.sha256,
                store_key=f"datasets/{dataset}.jsonl",
                dataset_id=dataset,
            )
        return dataset

    # --- Faults -------------------------------------------------------------------------------------------

    def kill_engine(self, rng: random.Random) -> bool:
        return self._kill_one(rng, self._engines())

    def kill_child(self, rng: random.Random) -> bool:
        mains = [self.processes[name] for name in _WORKERS]
        return self._kill_one(rng, [child.pid for main in mains for child in _children(main.pid)])

    def kill_worker(self, rng: random.Random) -> bool:
        return self._kill_one(rng, [self.processes[rng.choice(_WORKERS)].pid])

    def freeze_worker(self, rng: random.Random) -> bool:
        """Freeze a worker for longer than its lease lasts."""
        main = self.processes[rng.choice(_WORKERS)].pid
        return self._freeze([main, *(child.pid for child in _children(main))])

    def freeze_engine(self, rng: random.Random) -> bool:
        """Freeze an engine for good: only the worker's stall limit ends it."""
        running = sorted(self._engines())
        _send([rng.choice(running)] if running else [], signal.SIGSTOP)
        return bool(running)

    def end_worker(self, rng: random.Random) -> bool:
        _send([self.processes[rng.choice(_WORKERS)].pid], signal.SIGTERM)
        return True

    def kill_scheduler(self) -> bool:
        _send([self.processes["scheduler"].pid], signal.SIGKILL)
        return True

    def kill_broker(self) -> bool:
        _send([self.processes["broker"].pid], signal.SIGKILL)
        return True

    def freeze_broker(self) -> bool:
        return self._freeze([self.processes["broker"].pid])

    def empty_broker(self) -> bool:
        return self._at_broker("FLUSHALL")

    def cut_connections(self) -> bool:
        return self._at_broker("CLIENT KILL TYPE normal SKIPME yes")

    def make_worker_sick(self, rng: random.Random) -> bool:
        """Let every engine of a worker fail by a fault of the system, those that it starts and those that run."""
        marker = self._marker(rng.choice(_WORKERS))
        marker.touch()
        self._later(_SICK_SECONDS, lambda: marker.unlink(missing_ok=True))
        return True

    def suspend_all(self) -> bool:
        """Freeze all processes but the broker for longer than a lease lasts, as a suspended machine does."""
        mains = [self.processes[name].pid for name in ("scheduler", *_WORKERS)]
        pids = [*mains, *(child.pid for main in mains for child in _children(main)), *self._engines()]
        return self._freeze(pids)

    def step_clock(self, rng: random.Random) -> bool:
        """Set the clock of the database an hour ahead, or back to where it was; not that of SQLite, the machine's."""
        if self.database.engine.dialect.name != "postgresql":
            return False
        step = rng.choice([0, _CLOCK_STEP_SECONDS])
        name = str(self.database.engine.url.database)
        # Found before pg_catalog by every connection that is made from now on; those that are there are cut.
        statements = (
            f"CREATE SCHEMA IF NOT EXISTS {_STEPPED_CLOCK}",
            f"CREATE OR REPLACE FUNCTION {_STEPPED_CLOCK}.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE"
            f" AS 'SELECT pg_catalog.clock_timestamp() + make_interval(secs => {step})'",
            f'ALTER DATABASE "{name}" SET search_path = {_STEPPED_CLOCK}, public, pg_catalog',
            _CUT_OTHERS,
        )
        with self.database.engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)
            connection.commit()
        self.database.close()
        return True

    def take_database_away(self, seconds: float) -> bool:
        """Let no process reach the database for many leases, and supervise the others meanwhile."""
        if self.database.engine.dialect.name != "postgresql":
            with self.database.transaction(write=True):
                self.supervise(until=time.monotonic() + seconds)
            return True
        url = self.database.engine.url
        self.database.close()
        server = sa.create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
        with server.connect() as connection:
            connection.exec_driver_sql(f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS false')
            try:
                connection.execute(sa.text(_CUT_ALL), {"name": url.database})
                self.supervise(until=time.monotonic() + seconds)
            finally:
                connection.exec_driver_sql(f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS true')
        server.dispose()
        return True

    def lock_database(self) -> bool:
        """Hold the lock that every writer needs, for half a lease."""
        with self.database.transaction(write=True) as session:
            on_postgresql = session.get_bind().dialect.name == "postgresql"
            session.execute(sa.text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE" if on_postgresql else "SELECT 1"))
            time.sleep(LEASE_SECONDS / 2)
        return True

    def cut_database(self) -> bool:
        """Cut every connection to PostgreSQL, whatever it is in the middle of."""
        if self.database.engine.dialect.name != "postgresql":
            return False
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        with self.database.transaction(write=True) as session:
            session.execute(sa.text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
        return True

    def fill_disk(self) -> bool:
        """Leave no space on the disk of all files for half a lease, where that disk is the service's own."""
        home = self.settings.home
        if home.parent.stat().st_dev == home.parent.parent.stat().st_dev:
            return False
        ballast = home.with_name("ballast")
        free = shutil.disk_usage(home).free
        try:
            small_disk.fill(ballast, 0)
            time.sleep(LEASE_SECONDS / 2)
        finally:
            ballast.unlink()
            # The service may write meanwhile, but not half the disk.
            small_disk.wait_for_space(home, free // 2)
        return True

    def _at_broker(self, command: str) -> bool:
        try:
            with redis.Redis.from_url(str(self.settings.redis_url)) as client:
                client.execute_command(*command.split())
        except redis.RedisError:
            return False
        return True

    def _freeze(self, pids: list[int]) -> bool:
        """Freeze processes for longer than a lease lasts."""
        _send(pids, signal.SIGSTOP)
        self._later(1.5 * LEASE_SECONDS, lambda: _send(pids, signal.SIGCONT))
        return True

    def _later(self, seconds: float, action: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, action)
        timer.start()
        self.resume_timers = [each for each in self.resume_timers if each.is_alive()] + [timer]

    def _marker(self, worker: str) -> Path:
        """The file while which exists the engines of a worker fail."""
        return self.settings.home / f"{worker}.sick"

    def _kill_one(self, rng: random.Random, pids: list[int]) -> bool:
        if not pids:
            return False
        _send([rng.choice(sorted(pids))], signal.SIGKILL)
        return True

    def _engines(self) -> list[int]:
        work = str(self.settings.work_root)
        return [each.pid for each in self._processes_of_home() if work in " ".join(each.cmdline())]

    def _processes_of_home(self) -> list[psutil.Process]:
        """The processes of this service, but for this one."""
        processes = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                is_of_home = process.environ().get("POCL_HOME") == str(self.settings.home) or str(
                    self.settings.home
                ) in " ".join(process.cmdline())
                if is_of_home and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
        return processes

    # --- Processes ----------------------------------------------------------------------------------------

    def _start(self, name: str) -> None:
        with (self.settings.home / f"{name}.log").open("ab") as log:
            self.processes[name] = spawn(self._command(name), stdout=log, environment=self._environment(name))

    def _command(self, name: str) -> list[str]:
        if name == "broker":
            socket = self.settings.home / "broker.sock"
            socket.unlink(missing_ok=True)
            return valkey.command(valkey.find().path, socket)
        return [sys.executable, "-m", "worker", "scheduler" if name == "scheduler" else "run"]

    def _environment(self, name: str) -> dict[str, str]:
        settings = self.settings
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("POCL_")},
            "POCL_HOME": str(settings.home),
            "POCL_DATABASE_URL": settings.database_url,
            "POCL_REDIS_URL": str(settings.redis_url),
            "POCL_LEASE_SECONDS": str(settings.lease_seconds),
            "POCL_HEARTBEAT_SECONDS": str(settings.heartbeat_seconds),
            "POCL_REAPER_SECONDS": str(settings.reaper_seconds),
            "POCL_MAX_ATTEMPTS": str(settings.max_attempts),
            "POCL_MAX_FAILURES": str(settings.max_failures),
            "POCL_RETRY_SECONDS": str(settings.retry_seconds),
            "POCL_MAX_RETRY_SECONDS": str(settings.max_retry_seconds),
            "POCL_WORKER_ENGINE": json.dumps([sys.executable, str(_SICK_ENGINE), str(self._marker(name))]),
            "POCL_WORKER_TICK_SECONDS": "0.05",
            "POCL_WORKER_LEADER_SECONDS": "3",
            "POCL_WORKER_STALL_SECONDS": str(_STALL_SECONDS),
            "POCL_WORKER_GRACE_SECONDS": json.dumps(_GRACE_SECONDS / 2),
            "OMP_NUM_THREADS": "1",
        }


def _children(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return list(psutil.Process(pid).children())
    return []


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
