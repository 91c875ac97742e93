"""An API process that is killed while it reads an upload that it has accepted: the next one ends what it began."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from domain.datasets.models import Dataset
from domain.db import Database, db_now
from tests.support.api_process import ServiceProcess, serving
from tests.support.requests import AUTHORIZED, JSONL, jsonl
from tests.support.waiting import eventually

ROWS = 10_000
"""So many that they take a process a while."""


def send(client: httpx2.Client, address: str, body: bytes) -> str:
    response = client.post(f"{address}/v1/datasets", content=body, headers=JSONL)
    assert response.status_code == 202, response.text
    dataset: str = response.json()["id"]
    return dataset


def shown(client: httpx2.Client, address: str, dataset: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = client.get(f"{address}/v1/datasets/{dataset}").json()
    return found


@pytest.mark.slow
def test_upload_whose_process_was_killed_ends_ready_or_refused(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)

    def service(name: str, *, expects_kill: bool) -> AbstractContextManager[ServiceProcess]:
        log = tmp_path / name
        return serving(home, log, expects_kill=expects_kill, database_url=database_url, sync_upload_bytes="1000")

    rows = jsonl(ROWS)
    with httpx2.Client(headers=AUTHORIZED, timeout=60, verify=False) as client:
        with service("killed", expects_kill=True) as killed:
            good, bad = (send(client, killed.address, body) for body in (rows, rows + b"no row\n"))

            def is_being_read() -> bool:
                with database.transaction(write=False) as session:
                    return (session.get_one(Dataset, good).validations or 0) > 0

            eventually(is_being_read, what="the upload is being read")
            killed.process.kill()
        with database.transaction(write=True) as session:
            # Whoever held the lease is gone; time passes.
            held = sa.update(Dataset).where(Dataset.validated_until.is_not(None))
            session.execute(held.values(validated_until=db_now(-1)))
        with service("next", expects_kill=False) as after:

            def statuses() -> list[str]:
                return [shown(client, after.address, dataset)["status"] for dataset in (good, bad)]

            eventually(lambda: "validating" not in statuses(), within=120, what="both are validated")
            assert statuses() == ["ready", "refused"]
            assert shown(client, after.address, good)["rows"] == ROWS
