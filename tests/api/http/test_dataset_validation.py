"""Large uploads: answered by 202, and validated whatever becomes of the client and of the process."""

import asyncio
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from httpx2 import Response
from sqlalchemy import update
from starlette.testclient import TestClient

from api.app import create_app
from api.datasets.validation import DatasetValidator
from domain.datasets.models import Dataset
from domain.datasets.validation import MAX_VALIDATIONS, claim_validation, source_key
from domain.db import Database, db_now
from domain.settings import Settings
from pocl.limited_process import ProcessCrashed
from pocl.samples.limited_storing import SampleStorer
from pocl.samples.reading import ReadReport
from pocl.spec import FileFormat, ReadOptions
from tests.support.requests import AUTHORIZED, JSONL, LOOPBACK, expect_problem, jsonl, pointers, specification
from tests.support.waiting import eventually

LARGE = jsonl(40)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"sync_upload_bytes": len(LARGE) - 1})


@pytest.fixture
def serve(app: FastAPI, settings: Settings) -> Callable[[], TestClient]:
    """A client of a process that has just started; within its block data sets are validated."""
    del app  # It has made the database.
    return lambda: TestClient(
        create_app(settings), base_url=LOOPBACK, raise_server_exceptions=False, headers=AUTHORIZED
    )


@pytest.fixture
def idle(app: FastAPI) -> TestClient:
    """A client of a process whose validation never begins: it has not been started."""
    return TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, headers=AUTHORIZED)


def send(client: TestClient, body: bytes = LARGE, **parameters: str) -> Response:
    return client.post("/v1/datasets", params=parameters, content=body, headers=JSONL)


def validated(client: TestClient, dataset: str) -> dict[str, Any]:
    """The data set once it is validated."""
    address = f"/v1/datasets/{dataset}"
    eventually(lambda: client.get(address).json()["status"] != "validating", what="the data set is validated")
    found: dict[str, Any] = client.get(address).json()
    return found


def stored(settings: Settings) -> list[str]:
    root = settings.artifact_root
    return sorted(path.relative_to(root).parts[0] for path in root.rglob("*") if path.is_file())


def test_a_large_upload_is_validated_after_its_answer(serve: Callable[[], TestClient], settings: Settings) -> None:
    with serve() as client:
        small = send(client, jsonl(3))
        assert (small.status_code, small.json()["status"], small.json()["refusal"]) == (201, "ready", None)
        answer = send(client, name="large")
        assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/datasets/{answer.json()['id']}")
        nothing_yet = dict.fromkeys(("rows", "prompts", "size_bytes", "sha256", "ingestion", "refusal"))
        assert answer.json().items() >= (nothing_yet | {"status": "validating", "name": "large"}).items()
        dataset = validated(client, answer.json()["id"])
        assert (dataset["status"], dataset["rows"], dataset["name"]) == ("ready", 40, "large")
        # As a small upload of the same samples has it.
        packed = client.post("/v1/datasets", content=gzip.compress(LARGE), headers=JSONL).json()
        assert {name: packed[name] for name in ("rows", "sha256", "size_bytes")}.items() <= dataset.items()
        assert dataset["ingestion"]["size_bytes"] == len(LARGE)
        response = client.post("/v1/jobs", json={"spec": specification(dataset["id"])})
        assert response.status_code == 201
    assert stored(settings) == ["datasets"] * 3


def test_a_large_upload_with_wrong_rows_is_refused_with_the_report(
    serve: Callable[[], TestClient], settings: Settings
) -> None:
    lines = LARGE.splitlines()
    lines[2] = lines[30] = b'{"instruction": "' + b"SECRET " * 20 + b'"}'
    with serve() as client:
        dataset = validated(client, send(client, b"\n".join(lines)).json()["id"])
        assert (dataset["status"], dataset["rows"]) == ("refused", None)
        assert (dataset["refusal"]["code"], dataset["refusal"]["retryable"]) == ("dataset_invalid", False)
        assert [error["pointer"] for error in dataset["refusal"]["errors"]] == ["/lines/3", "/lines/31"]
        assert "2 of 40" in dataset["refusal"]["message"]
        assert "SECRET" not in str(dataset)
        problem = expect_problem(
            client.post("/v1/jobs/validate", json={"spec": specification(dataset["id"])}), 422, "spec_invalid"
        )
        assert [error["code"] for error in problem["errors"]] == ["dataset_refused"]
        skipped = validated(client, send(client, b"\n".join(lines), on_bad_rows="skip").json()["id"])
        assert (skipped["status"], skipped["rows"], skipped["ingestion"]["skipped"]) == ("ready", 38, 2)
        assert client.delete(f"/v1/datasets/{dataset['id']}").status_code == 204
    assert stored(settings) == ["datasets"]


def test_a_job_that_names_a_data_set_too_early_is_refused(idle: TestClient, settings: Settings) -> None:
    dataset = send(idle).json()["id"]
    problem = expect_problem(idle.post("/v1/jobs", json={"spec": specification(dataset)}), 422, "spec_invalid")
    assert pointers(problem) == ["/spec/data/train/dataset"]
    assert problem["errors"][0]["code"] == "dataset_not_ready"
    expect_problem(idle.get(f"/v1/datasets/{dataset}/preview?model=random"), 409, "dataset_not_ready")
    assert [each["status"] for each in idle.get("/v1/datasets").json()["data"]] == ["validating"]
    assert idle.delete(f"/v1/datasets/{dataset}").status_code == 204
    assert stored(settings) == []


def test_validation_survives_the_process_that_took_the_upload(
    idle: TestClient, serve: Callable[[], TestClient], database: Database
) -> None:
    waiting, held = (send(idle).json()["id"] for _ in range(2))
    with database.transaction(write=True) as session:
        # The process of the second died while it read the file.
        session.execute(update(Dataset).where(Dataset.id == held).values(validations=1, validated_until=db_now(-1)))
    with serve() as client:
        assert [validated(client, dataset)["status"] for dataset in (waiting, held)] == ["ready"] * 2


def test_a_data_set_whose_file_is_gone_is_refused_and_says_what_to_do(
    idle: TestClient, serve: Callable[[], TestClient], settings: Settings
) -> None:
    dataset = send(idle).json()["id"]
    shutil.rmtree(settings.artifact_root / Path(source_key(dataset)).parent)
    with serve() as client:
        refusal = validated(client, dataset)["refusal"]
    assert (refusal["code"], refusal["retryable"]) == ("upload_lost", True)
    assert "send it again" in refusal["message"]


class CrashingStorer(SampleStorer):
    """A storer whose process dies."""

    def store(self, target: Path, options: ReadOptions, *, hint: FileFormat | None = None) -> ReadReport:
        del target, options, hint
        raise ProcessCrashed("crashes (signal 9)")


def test_a_file_whose_reading_dies_again_and_again_is_refused(
    idle: TestClient, app: FastAPI, database: Database, settings: Settings
) -> None:
    dataset = send(idle).json()["id"]
    validator = DatasetValidator(
        database,
        app.state.store,
        settings.home,
        lease_seconds=0.05,
        look_seconds=0.01,
        open_storer=CrashingStorer,
    )

    async def run() -> None:
        task = asyncio.create_task(validator.run())
        while idle.get(f"/v1/datasets/{dataset}").json()["status"] == "validating":
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(run())
    refused = idle.get(f"/v1/datasets/{dataset}").json()
    assert (refused["status"], refused["refusal"]["code"]) == ("refused", "file_not_read_now")
    assert refused["refusal"]["retryable"] is True
    with database.transaction(write=False) as session:
        # On a busy machine a lease of this length may expire before its attempt has ended.
        assert session.get_one(Dataset, dataset).validations >= MAX_VALIDATIONS
    assert stored(settings) == []


def test_a_file_that_killed_its_service_again_and_again_is_read_no_more(
    idle: TestClient, serve: Callable[[], TestClient], database: Database, settings: Settings
) -> None:
    dataset = send(idle).json()["id"]
    with database.transaction(write=True) as session:
        columns = {"validations": MAX_VALIDATIONS, "validated_until": db_now(-1)}
        session.execute(update(Dataset).where(Dataset.id == dataset).values(columns))
    with serve() as client:
        assert validated(client, dataset)["refusal"]["code"] == "file_not_read_now"
    assert stored(settings) == []


def test_one_process_at_a_time_validates_a_data_set(idle: TestClient, database: Database) -> None:
    dataset = send(idle).json()["id"]
    numbers = []
    for _ in range(MAX_VALIDATIONS):
        with database.transaction(write=True) as session:
            claim = claim_validation(session, lease_seconds=60)
            assert claim is not None
            assert claim_validation(session, lease_seconds=60) is None
            numbers.append(claim.number)
            session.execute(update(Dataset).where(Dataset.id == dataset).values(validated_until=db_now(-1)))
    assert numbers == list(range(1, MAX_VALIDATIONS + 1))


def test_an_accepted_upload_is_accepted_once_for_its_key(idle: TestClient, settings: Settings) -> None:
    headers = JSONL | {"idempotency-key": "one"}
    first, again = (idle.post("/v1/datasets", content=LARGE, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code, again.headers["idempotent-replayed"]) == (202, 202, "true")
    assert again.json() == first.json()
    assert stored(settings) == ["uploads"]
