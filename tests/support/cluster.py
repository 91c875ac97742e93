"""A harness whose jobs are run by real processes: workers and a scheduler, on a real broker."""

import signal
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from domain.db import Database
from domain.jobs.states import JobStatus
from tests.support.harness import ServiceHarness, kill, processes_mentioning
from tests.support.processes import Processes, ProcessHandle
from tests.support.waiting import eventually
from worker.app import celery_app
from worker.doorbell import Doorbell

OPEN_TRANSACTIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
"""


class ClusterHarness:
    """A harness, and the workers and schedulers that a test starts for it.

    Each engine is the fake one. It waits at step 5 until the file `gate` exists.
    """

    def __init__(self, harness: ServiceHarness, processes: Processes, queue: str, gate: Path) -> None:
        self.harness = harness
        self._processes = processes
        self._environment = harness.environment("--hold", "5", "--gate", str(gate), queue=queue)
        self.doorbell = Doorbell(celery_app(str(harness.redis_url), queue))

    def start_worker(self) -> ProcessHandle:
        return self._processes.start("run", self._environment)

    def start_scheduler(self) -> ProcessHandle:
        return self._processes.start("scheduler", self._environment)

    def wait_for_step(self, job: str, step: int) -> None:
        eventually(lambda: self.harness.job(job).step >= step, within=60, what=f"step {step}")

    def wait_for_status(self, job: str, status: JobStatus) -> None:
        def has_status() -> bool:
            return self.harness.job(job).status is status

        eventually(has_status, within=60, what=f"{status}; statuses so far: {self.harness.status_history(job)}")

    def freeze(self, processes: Sequence[int]) -> None:
        """Stop processes (SIGSTOP) between two of their transactions.

        One that is stopped within a transaction keeps its locks, and with SQLite's one all other writers, until the
        database ends that transaction: another fault than that of a process which is frozen.
        """

        def stopped_without_lock() -> bool:
            for process in processes:
                kill(process, signal.SIGSTOP)
            if is_lock_free(self.harness.database):
                return True
            for process in processes:
                kill(process, signal.SIGCONT)
            return False

        eventually(stopped_without_lock, what="a moment when none of the processes writes")


def is_lock_free(database: Database) -> bool:
    """Whether no process holds SQLite's write lock just now, or is within a transaction on PostgreSQL."""
    if database.engine.dialect.name != "sqlite":
        with database.transaction(write=False) as session:
            return not session.scalar(sa.text(OPEN_TRANSACTIONS))
    with closing(sqlite3.connect(str(database.engine.url.database), timeout=0.2, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        connection.execute("ROLLBACK")
    return True


def engines(harness: ServiceHarness, job: str, attempt: int) -> dict[int, str]:
    """The command lines of the processes of an attempt's engine, by process id."""
    return processes_mentioning(str(harness.settings.work_root / f"{job}.{attempt}"))


def children_of(parent: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
