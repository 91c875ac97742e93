"""A harness with the processes that serve it: real workers, a scheduler, a broker."""

from pathlib import Path

from domain.jobs.states import JobStatus
from tests.support.harness import ServiceHarness, processes_mentioning
from tests.support.processes import Processes, ProcessHandle
from tests.support.waiting import eventually
from worker.app import celery_app
from worker.doorbell import Doorbell


class ClusterHarness:
    """A harness with processes that serve it."""

    def __init__(self, harness: ServiceHarness, processes: Processes, queue: str, gate: Path) -> None:
        self.harness = harness
        self._crew = processes
        self._environment = harness.environment("--hold", "5", "--gate", str(gate), queue=queue)
        self.bell = Doorbell(celery_app(str(harness.redis_url), queue))

    def worker(self) -> ProcessHandle:
        return self._crew.start("run", self._environment)

    def scheduler(self) -> ProcessHandle:
        return self._crew.start("scheduler", self._environment)

    def wait_for_step(self, job: str, step: int) -> None:
        eventually(lambda: self.harness.job(job).step >= step, within=60, what=f"step {step}")

    def wait_for_status(self, job: str, status: JobStatus) -> None:
        def look() -> bool:
            return self.harness.job(job).status is status

        eventually(look, within=60, what=f"{status}; moves {self.harness.status_history(job)}")


def engines(harness: ServiceHarness, job: str, attempt: int) -> dict[int, str]:
    return processes_mentioning(str(harness.settings.work_root / f"{job}.{attempt}"))


def children_of(parent: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
