"""A workshop with the processes that serve it: real workers, a scheduler, a broker."""

from pathlib import Path

from domain.jobs.states import JobStatus
from tests.support.harness import Workshop, processes_mentioning
from tests.support.processes import Crew, Member
from tests.support.waiting import eventually
from worker.app import celery_app
from worker.doorbell import Doorbell


class Shop:
    """A workshop with processes that serve it."""

    def __init__(self, workshop: Workshop, crew: Crew, queue: str, gate: Path) -> None:
        self.workshop = workshop
        self._crew = crew
        self._environment = workshop.environment("--hold", "5", "--gate", str(gate), queue=queue)
        self.bell = Doorbell(celery_app(str(workshop.redis_url), queue))

    def worker(self) -> Member:
        return self._crew.start("run", self._environment)

    def scheduler(self) -> Member:
        return self._crew.start("scheduler", self._environment)

    def reaches(self, job: str, step: int) -> None:
        eventually(lambda: self.workshop.job(job).step >= step, within=60, what=f"step {step}")

    def becomes(self, job: str, status: JobStatus) -> None:
        def look() -> bool:
            return self.workshop.job(job).status is status

        eventually(look, within=60, what=f"{status}; moves {self.workshop.moves(job)}")


def engines(workshop: Workshop, job: str, attempt: int) -> dict[int, str]:
    return processes_mentioning(str(workshop.settings.work_root / f"{job}.{attempt}"))


def children_of(parent: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
