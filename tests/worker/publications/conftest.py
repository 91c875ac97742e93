"""Jobs whose students are to be pushed, with files in the store, and publishers beside a stand-in of the Hub."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from domain.db import db_now
from domain.publications.models import Publication
from pocl.events import CheckpointKind
from pocl.storage.manifest import write_manifest
from tests.support.harness import ServiceHarness
from tests.support.hub_server import TOKEN, HubServer, running_hub
from tests.support.rows import save_checkpoint
from tests.support.worker_actions import claim_queued_job, succeed_job
from worker.publications.process import PushProcess
from worker.publications.publisher import HubPublisher
from worker.scratch_directory import ScratchDirectory

REPO = "acme/student"
LONG = 200.0
"""Seconds that nothing takes, however slow the machine is."""
FILES: Mapping[str, bytes] = {
    "config.json": b'{"model_type": "llama"}\n',
    "README.md": b"---\nlibrary_name: transformers\n---\n\n# A student\n",
    "model.safetensors": bytes(range(256)) * 8000,
    "gguf/model-f16.gguf": b"GGUF" * 1000,
}


class PublishedJobs:
    """Jobs of one service that have succeeded, and publishers that push their students."""

    def __init__(self, harness: ServiceHarness, hub: HubServer, directory: Path) -> None:
        self.harness = harness
        self.hub = hub
        self.directory = directory
        self.publishers: list[HubPublisher] = []

    def succeed(self, files: Mapping[str, bytes] = FILES, *, kind: CheckpointKind = "final", **push: Any) -> str:
        """Submit a job that asks for a push, and have it succeed with these files; its id."""
        job_id = self.harness.submit(export={"hub": {"repo": REPO, **push}})
        claim = claim_queued_job(self.harness.database)
        source = self.directory / f"source-{job_id}"
        for path, content in files.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(content)
        write_manifest(source)
        key = f"jobs/{job_id}/attempt-{claim.token}/{kind}-00000012"
        size = self.harness.store.publish(source, key).size_bytes
        save_checkpoint(self.harness.database, claim, kind, 12, store_key=key, size_bytes=size)
        succeed_job(self.harness.database, claim)
        return job_id

    def publisher(self, process: PushProcess | None = None, **changes: Any) -> HubPublisher:
        """A publisher by a process of the real client, or by `process` in its place."""
        remote = self.harness.store.is_remote
        settings: dict[str, Any] = {
            "owners": self.harness.settings.hub_publish_to,
            "process": process or self.process(),
            "scratch": ScratchDirectory.make(self.directory / "scratch") if remote else None,
            "jitter": lambda: 0.5,
            **changes,
        }
        publisher = HubPublisher(self.harness.database, self.harness.store, **settings)
        self.publishers.append(publisher)
        return publisher

    def process(self, **changes: Any) -> PushProcess:
        environ = {**os.environ, **self.hub.environment()}
        return PushProcess(**{"token": TOKEN, "timeout_seconds": LONG, "environ": environ, **changes})

    def turn(self, publisher: HubPublisher) -> Publication:
        """A turn at a moment when everything is due, leases that nobody renews included; the publication after it."""
        with self.harness.database.transaction(write=True) as session:
            session.execute(sa.update(Publication).values(not_before=db_now(-1)))
            session.execute(
                sa.update(Publication)
                .where(Publication.lease_expires_at.is_not(None))
                .values(lease_expires_at=db_now(-1))
            )
        assert publisher.turn()
        return self.row()

    def row(self) -> Publication:
        """The publication of the only job."""
        with self.harness.database.transaction(write=False) as session:
            return session.scalars(sa.select(Publication)).one()

    def expected(self) -> dict[str, bytes]:
        """The files of the only job's checkpoint in the store, the manifest among them."""
        row, store = self.row(), self.harness.store
        assert row.store_key is not None
        return {
            file.path: b"".join(store.read(row.store_key, file.path, 0, file.size))
            for file in store.manifest(row.store_key).files
        }

    def assert_pushed_once(self, branch: str = "main") -> None:
        """The law: the branch has exactly the files of the checkpoint, by one commit."""
        row = self.row()
        assert (row.state, row.error) == ("published", None)
        repository = self.hub.repositories[row.repo]
        assert repository.files(branch) == self.expected()
        assert repository.commits_after_creation(branch) == 1
        assert row.commit == repository.branches[branch][-1]
        assert [event.type for event in self.harness.events(row.job_id)][-1] == "published"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running_hub() as server:
        yield server


@pytest.fixture
def published_jobs(hub: HubServer, tmp_path: Path) -> Iterator[Callable[..., PublishedJobs]]:
    """Makes them over the database of a URL."""
    made: list[PublishedJobs] = []

    def make(database_url: str, **changes: Any) -> PublishedJobs:
        harness = ServiceHarness(tmp_path / "home", database_url, **{"hub_publish_to": ("acme",), **changes})
        made.append(PublishedJobs(harness, hub, tmp_path))
        return made[-1]

    yield make
    for jobs in made:
        for publisher in jobs.publishers:
            publisher.close()
        jobs.harness.close()


@pytest.fixture
def published(published_jobs: Callable[..., PublishedJobs], database_url: str) -> PublishedJobs:
    """On SQLite and on PostgreSQL."""
    return published_jobs(database_url)
