"""Checkpoints of jobs that have succeeded, with files in the store, and exporters by a real or a fake process."""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from domain.db import db_now
from domain.exports.models import CheckpointExport
from domain.jobs.export_requests import request_export
from pocl.spec import GgufFormat
from pocl.storage.manifest import write_manifest
from tests.support.harness import PROJECT, ServiceHarness
from tests.support.rows import save_checkpoint
from tests.support.worker_actions import claim_queued_job, succeed_job
from worker.exports.conversion import GgufConversion
from worker.exports.exporter import CheckpointExporter

FAKE_EXPORT = Path(__file__).with_name("fake_export.py")
FILES: Mapping[str, bytes] = {
    "config.json": b'{"model_type": "llama"}\n',
    "model.safetensors": bytes(range(256)) * 4000,
}


class ExportedCheckpoints:
    """The checkpoints of one service, and exporters of them."""

    def __init__(self, harness: ServiceHarness, directory: Path) -> None:
        self.harness = harness
        self.directory = directory
        self.scratch = directory / "scratch"
        self.scratch.mkdir()

    def store(self, source: Path | None = None) -> str:
        """Have a job succeed with a checkpoint of these files; the id of the checkpoint."""
        job_id = self.harness.submit()
        claim = claim_queued_job(self.harness.database)
        if source is None:
            source = self.directory / f"source-{job_id}"
            source.mkdir()
            for path, content in FILES.items():
                (source / path).write_bytes(content)
        write_manifest(source)
        key = f"jobs/{job_id}/attempt-{claim.token}/final-00000012"
        size = self.harness.store.publish(source, key).size_bytes
        row = save_checkpoint(self.harness.database, claim, "final", 12, store_key=key, size_bytes=size)
        succeed_job(self.harness.database, claim)
        return row.id

    def ask(self, checkpoint_id: str, export_format: GgufFormat = "q8_0") -> str:
        """Ask for an export; its id."""
        with self.harness.database.transaction(write=True) as session:
            result = request_export(session, self.harness.settings, PROJECT, checkpoint_id, export_format)
            return result.export.id

    def exporter(
        self, mode: str | None = "whole", *, should_stop: Callable[[], bool] = lambda: False, **changes: Any
    ) -> CheckpointExporter:
        """An exporter by the fake process, or by the real one."""
        options = self.harness.options(**changes.pop("options", {}))
        fake: dict[str, Any] = {} if mode is None else {"command": [sys.executable, str(FAKE_EXPORT), mode]}
        conversion = GgufConversion(self.harness.settings, options, **fake, **changes.pop("conversion", {}))
        return CheckpointExporter(
            self.harness.database,
            self.harness.store,
            self.scratch,
            conversion,
            should_stop,
            **{"jitter": lambda: 0.5, **changes},
        )

    def turn(self, exporter: CheckpointExporter) -> CheckpointExport:
        """A turn at a moment when everything is due, leases that nobody renews included; the only export after it."""
        with self.harness.database.transaction(write=True) as session:
            session.execute(sa.update(CheckpointExport).values(not_before=db_now(-1)))
            session.execute(
                sa.update(CheckpointExport)
                .where(CheckpointExport.lease_expires_at.is_not(None))
                .values(lease_expires_at=db_now(-1))
            )
        assert exporter.turn()
        assert list(self.scratch.iterdir()) == []
        return self.row()

    def row(self) -> CheckpointExport:
        with self.harness.database.transaction(write=False) as session:
            return session.scalars(sa.select(CheckpointExport)).one()

    def stored(self, row: CheckpointExport) -> dict[str, bytes]:
        """The files of an export in the store, the manifest among them."""
        store = self.harness.store
        assert row.store_key is not None
        return {
            file.path: b"".join(store.read(row.store_key, file.path, 0, file.size))
            for file in store.manifest(row.store_key).files
        }

    def stored_attempts(self) -> list[str]:
        """The keys below which attempts at exports of the only checkpoint have stored files."""
        with self.harness.database.transaction(write=False) as session:
            key = session.connection().exec_driver_sql("SELECT store_key FROM checkpoints").scalar_one()
        return self.harness.store.list_keys(f"{key}/exports")


@pytest.fixture
def exported(database_url: str, tmp_path: Path) -> Iterator[ExportedCheckpoints]:
    """On SQLite and on PostgreSQL."""
    harness = ServiceHarness(tmp_path / "home", database_url)
    yield ExportedCheckpoints(harness, tmp_path)
    harness.close()
