"""A worker and its SQLite database on one disk of a few megabytes, which fills up while a job runs.

A program to be started with a directory, in a mount namespace of its own. It prints what became of the jobs as JSON.
"""

import json
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.faults.small_disk import fill, mount
from domain.database_errors import DatabaseUnavailable
from domain.schema import upgrade
from tests.support.harness import ServiceHarness
from tests.support.waiting import eventually

MEGABYTES = 28
_FREE_BYTES = 2 * 4096


@dataclass
class ServiceResult:
    """What a full disk did to a service."""

    waiting_job: str = ""
    """The status of a queued job that was cancelled while the disk was full."""
    reason: str = ""
    """Why the attempt of the running job ended."""
    fault: str = ""
    commits: int = 0
    """How many transactions were committed on the full disk, of those that were tried."""
    tried: int = 400
    status_afterwards: str = ""
    """The status of the job that was retried, or tried again, once there was space."""


def main() -> int:
    disk = Path(sys.argv[1])
    mount(disk, MEGABYTES)
    home, ballast = disk / "home", disk / "ballast"
    harness = ServiceHarness(home, f"sqlite:///{home / 'pocl.sqlite3'}")
    upgrade(harness.settings)
    result = ServiceResult()
    running, waiting = harness.submit(), harness.submit()

    def fill_up() -> None:
        eventually(lambda: harness.job(running).step >= 5, within=60, what="the engine runs")
        fill(ballast, _FREE_BYTES)
        harness.cancel(waiting)
        result.waiting_job = str(harness.job(waiting).status)
        (disk / "home" / "gate").touch()

    thread = threading.Thread(target=fill_up)
    thread.start()
    harness.supervisor("--hold", "5", "--gate", str(home / "gate")).work_one()
    thread.join()
    reason = harness.attempts(running)[0].end_reason or {}
    result.reason, result.fault = str(reason.get("code")), str(reason.get("fault"))
    for _ in range(result.tried):
        result.commits += _commits(harness, running)
    ballast.unlink()
    final = harness.submit()
    while harness.job(final).status.value == "queued":
        harness.supervisor().work_one()
    result.status_afterwards = str(harness.job(final).status)
    harness.close()
    json.dump(asdict(result), sys.stdout)
    return 0


def _commits(harness: ServiceHarness, job: str) -> bool:
    """Whether a small change is committed."""
    try:
        with harness.database.transaction(write=True) as session:
            session.connection().exec_driver_sql("UPDATE jobs SET version = version + 1 WHERE id = ?", (job,))
    except DatabaseUnavailable:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
