"""Students of a running service: real schedulers push them, and one that is killed in an upload loses nothing."""

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from domain.db import db_now
from domain.jobs.states import JobStatus
from domain.publications.models import Publication
from domain.workers.repository import live_publisher
from tests.support.harness import ServiceHarness, kill
from tests.support.hub_server import TOKEN, Fault, running_hub
from tests.support.processes import Processes
from tests.support.waiting import eventually

REPO = "acme/student"


@pytest.mark.slow
@pytest.mark.system
def test_student_of_a_scheduler_that_was_killed_in_its_upload_is_pushed_once_by_another(
    processes: Processes, redis_url: str, tmp_path: Path, database_url: str
) -> None:
    harness = ServiceHarness(tmp_path / "home", database_url, redis_url=redis_url, hub_publish_to=("acme",))
    token_file = tmp_path / "token"
    token_file.write_text(f"{TOKEN}\n")
    arrived, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        arrived.set()
        goes_on.wait(100)

    with running_hub() as hub:
        hub.faults.append(Fault("POST", "/commit/", call=hold))
        environment = {
            **harness.environment(),
            **hub.environment(),
            "POCL_HUB_PUBLISH_TO": "acme",
            "POCL_HUB_WRITE_TOKEN_FILE": str(token_file),
        }
        job = harness.submit(export={"hub": {"repo": REPO}})
        assert harness.supervisor().work_one() is JobStatus.SUCCEEDED
        first = processes.start("scheduler", environment)
        eventually(arrived.is_set, within=60, what="the first scheduler pushes")
        with harness.database.transaction(write=False) as session:
            assert live_publisher(session, 60)
        kill(first.pid)
        goes_on.set()
        with harness.database.transaction(write=True) as session:
            # In place of a minute and a half.
            session.execute(sa.update(Publication).values(lease_expires_at=db_now(-1)))
        second = processes.start("scheduler", environment)

        def row() -> Publication:
            with harness.database.transaction(write=False) as session:
                return session.scalars(sa.select(Publication)).one()

        eventually(lambda: row().state == "published", within=60, what="another scheduler pushes it")
        student = next(each for each in harness.checkpoints(job) if each.kind == "final")
        files = harness.store.manifest(student.store_key).files
        assert hub.repositories[REPO].files() == {
            file.path: harness.store.locate(student.store_key, file.path).read_bytes() for file in files
        }
        assert hub.repositories[REPO].commits_after_creation() == 1
        assert TOKEN not in first.log + second.log
    harness.close()
