"""One attempt at the next job, with the real engine on one thread: `python -m bench.trainer`, settings as in POCL_*."""

from domain.artifacts import ArtifactStore
from domain.db import Database
from domain.settings import Settings
from domain.workers.models import Device
from worker.settings import WorkerSettings
from worker.supervisor import Supervisor


def main() -> None:
    settings = Settings()
    store = ArtifactStore(settings.artifact_root)
    options = WorkerSettings(threads=1)
    devices = [Device("cpu", "CPU", None)]
    Supervisor(Database(settings.database_url), store, settings, options, "bench", devices, lambda: False).work_one()


if __name__ == "__main__":
    main()
