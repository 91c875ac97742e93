"""Exports of a running service: a worker makes them beside its job, and one that ends leaves them to another."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from domain.exports.models import CheckpointExport
from domain.jobs.states import JobStatus
from tests.pocl.export.gguf_models import model_directory
from tests.support.harness import ServiceHarness
from tests.support.processes import Processes
from tests.support.waiting import eventually
from tests.worker.exports.conftest import ExportedCheckpoints

pytestmark = [pytest.mark.slow, pytest.mark.system]


def test_a_worker_exports_while_it_runs_a_job(
    processes: Processes, redis_url: str, tmp_path: Path, database_url: str
) -> None:
    harness = ServiceHarness(tmp_path / "home", database_url, redis_url=redis_url)
    exported = ExportedCheckpoints(harness, tmp_path)
    checkpoint = exported.store(model_directory("qwen2", tmp_path / "model"))
    environment = harness.environment("--hold", "1", export_seconds=0.2)
    processes.start("scheduler", environment)
    processes.start("run", environment)
    job = harness.submit()
    eventually(lambda: harness.job(job).status is JobStatus.RUNNING, within=60, what="the worker has a job")
    exported.ask(checkpoint)

    def row() -> CheckpointExport:
        with harness.database.transaction(write=False) as session:
            return session.scalars(sa.select(CheckpointExport)).one()

    eventually(lambda: row().state == "complete", within=120, what="the worker exports beside it")
    assert harness.job(job).status is JobStatus.RUNNING
    assert set(exported.stored(row())) == {"model-q8_0.gguf", "Modelfile", "manifest.json"}
    assert list((harness.settings.work_root / "exports").iterdir()) == []
    harness.close()
