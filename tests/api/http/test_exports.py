"""Exports over HTTP: one of each format, followed, refused where that is known, downloaded and deleted."""

import hashlib
import json
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from domain.artifacts import ArtifactStore
from domain.db import Database
from domain.jobs.export_feed import DueExport, ExportFailure, claim_export, record_exported, record_failed_export
from domain.settings import Settings
from pocl.storage.manifest import write_manifest
from tests.support.requests import expect_problem, pointers
from tests.support.rows import claim_job, save_checkpoint
from tests.support.scrapes import scrape, value

GGUF = b"GGUF" * 1000


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_exports_queued": 2})


@pytest.fixture
def store(app: FastAPI) -> ArtifactStore:
    store: ArtifactStore = app.state.store
    return store


def add_checkpoint(database: Database, store: ArtifactStore, settings: Settings, family: str = "llama") -> str:
    """The address of a checkpoint whose config names a family."""
    claim = claim_job(database)
    source = settings.home / f"source-{claim.job_id}"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": family}))
    write_manifest(source)
    key = f"jobs/{claim.job_id}/attempt-1/final-00000020"
    size = store.publish(source, key).size_bytes
    row = save_checkpoint(database, claim, "final", 20, store_key=key, size_bytes=size)
    return f"/v1/checkpoints/{row.id}"


@pytest.fixture
def address(database: Database, store: ArtifactStore, settings: Settings) -> str:
    return add_checkpoint(database, store, settings)


def ask(client: TestClient, address: str, export_format: str = "q8_0") -> dict[str, Any]:
    response = client.post(f"{address}/exports", json={"format": export_format})
    assert response.status_code in (200, 202), response.text
    export: dict[str, Any] = response.json()
    return export


def take(database: Database) -> DueExport:
    with database.transaction(write=True) as session:
        due = claim_export(session, lease_seconds=60)
    assert due is not None
    return due


def complete(database: Database, store: ArtifactStore, settings: Settings) -> None:
    """Make the export that is due as a worker would."""
    due = take(database)
    source = settings.home / due.export_id
    source.mkdir()
    (source / f"model-{due.format}.gguf").write_bytes(GGUF)
    (source / "Modelfile").write_text(f"FROM ./model-{due.format}.gguf\n")
    write_manifest(source)
    size = store.publish(source, due.store_key).size_bytes
    with database.transaction(write=True) as session:
        record_exported(session, due, size_bytes=size, manifest_sha256="a" * 64, notes=["Give it NFC."])


def test_there_is_one_export_of_a_checkpoint_in_a_format(client: TestClient, address: str) -> None:
    response = client.post(f"{address}/exports", json={"format": "q8_0"})
    assert response.status_code == 202
    export = response.json()
    assert response.headers["location"] == f"{address}/exports/{export['id']}"
    assert client.get(response.headers["location"]).json() == export
    assert None not in (export.pop("created_at"), export.pop("not_before"))
    assert export.pop("id").startswith("exp_")
    assert address.endswith(export.pop("checkpoint_id"))
    assert export.pop("job_id").startswith("job_")
    assert export == {
        "object": "checkpoint.export",
        "format": "q8_0",
        "state": "pending",
        "attempts": 0,
        "error": None,
        "size_bytes": None,
        "manifest_sha256": None,
        "notes": [],
        "completed_at": None,
    }
    again = client.post(f"{address}/exports", json={"format": "q8_0"})
    assert (again.status_code, again.json()["id"]) == (200, response.json()["id"])
    other = ask(client, address, "f16")
    page = client.get(f"{address}/exports").json()
    assert [each["id"] for each in page["data"]] == [other["id"], response.json()["id"]]
    page = client.get(f"{address}/exports", params={"limit": 1, "after": other["id"]}).json()
    assert ([each["id"] for each in page["data"]], page["has_more"]) == ([response.json()["id"]], False)


def test_a_request_that_is_sent_again_is_replayed(client: TestClient, address: str) -> None:
    key = {"idempotency-key": "once"}
    first, again = (client.post(f"{address}/exports", json={"format": "f16"}, headers=key) for _ in range(2))
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.headers["idempotent-replayed"] == "true"
    assert first.json() == again.json()


def test_what_is_no_request_is_refused_by_field(client: TestClient, address: str) -> None:
    for body, pointer in (
        ({}, "/format"),
        ({"format": "q4_k_m"}, "/format"),
        ({"format": ["q8_0"]}, "/format"),
        ({"format": "q8_0", "name": "x"}, "/name"),
    ):
        problem = expect_problem(client.post(f"{address}/exports", json=body), 422, "invalid")
        assert pointers(problem) == [pointer]


def test_a_family_that_cannot_be_written_is_refused_at_once(
    client: TestClient, database: Database, store: ArtifactStore, settings: Settings
) -> None:
    gpt2 = add_checkpoint(database, store, settings, family="gpt2")
    problem = expect_problem(client.post(f"{gpt2}/exports", json={"format": "q8_0"}), 422, "gguf_unsupported")
    assert "gpt2" in problem["detail"]
    assert "llama" in problem["detail"]
    assert client.get(f"{gpt2}/exports").json()["data"] == []


def test_more_than_a_project_may_have_is_refused_for_a_while(
    client: TestClient, database: Database, store: ArtifactStore, settings: Settings, address: str
) -> None:
    ask(client, address, "f32")
    ask(client, address, "f16")
    response = client.post(f"{address}/exports", json={"format": "q8_0"})
    expect_problem(response, 429, "quota_exceeded")
    assert int(response.headers["retry-after"]) > 0
    complete(database, store, settings)
    assert client.post(f"{address}/exports", json={"format": "q8_0"}).status_code == 202


def test_files_are_downloaded_as_those_of_a_checkpoint_are(
    client: TestClient, database: Database, store: ArtifactStore, settings: Settings, address: str
) -> None:
    export = f"{address}/exports/{ask(client, address)['id']}"
    for part in ("manifest", "files/model-q8_0.gguf"):
        expect_problem(client.get(f"{export}/{part}"), 409, "export_not_complete")
    complete(database, store, settings)
    shown = client.get(export).json()
    assert (shown["state"], shown["notes"], shown["error"]) == ("complete", ["Give it NFC."], None)
    assert shown["completed_at"] is not None
    files = {file["path"]: file for file in client.get(f"{export}/manifest").json()["files"]}
    assert set(files) == {"Modelfile", "manifest.json", "model-q8_0.gguf"}
    assert shown["size_bytes"] == sum(file["size"] for file in files.values())
    path = f"{export}/files/model-q8_0.gguf"
    whole, headed = client.get(path), client.head(path)
    assert whole.content == GGUF
    assert headed.headers["content-length"] == str(len(GGUF))
    assert whole.headers["etag"] == f'"{hashlib.sha256(GGUF).hexdigest()}"'
    assert files["model-q8_0.gguf"]["sha256"] in whole.headers["etag"]
    ranged = client.get(path, headers={"range": "bytes=4-7", "if-range": whole.headers["etag"]})
    assert (ranged.status_code, ranged.content) == (206, b"GGUF")
    assert client.get(path, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
    expect_problem(client.get(f"{export}/files/config.json"), 404, "file_not_found")
    # The checkpoint is what it was.
    listed = client.get(f"{address}/manifest").json()["files"]
    assert [each["path"] for each in listed] == ["config.json", "manifest.json"]


def test_a_failed_one_says_why_and_is_asked_for_again(client: TestClient, database: Database, address: str) -> None:
    export = ask(client, address)
    due = take(database)
    assert client.get(f"{address}/exports/{export['id']}").json()["state"] == "running"
    failure = ExportFailure("gguf_unsupported", "The tokenizer marks parts of words.", "user")
    with database.transaction(write=True) as session:
        record_failed_export(session, due, failure, wait_seconds=None)
    shown = client.get(f"{address}/exports/{export['id']}").json()
    assert (shown["state"], shown["error"]) == ("failed", failure.as_json())
    again = client.post(f"{address}/exports", json={"format": "q8_0"})
    assert (again.status_code, again.json()["id"], again.json()["attempts"]) == (202, export["id"], 0)


def test_a_deleted_one_is_gone_with_its_files_and_the_checkpoint_stays(
    client: TestClient, database: Database, store: ArtifactStore, settings: Settings, address: str
) -> None:
    export = f"{address}/exports/{ask(client, address)['id']}"
    expect_problem(client.delete(address), 409, "checkpoint_is_needed")
    complete(database, store, settings)
    with database.transaction(write=False) as session:
        key = session.connection().exec_driver_sql("SELECT store_key FROM checkpoint_exports").scalar_one()
    directory = settings.artifact_root / key
    assert directory.is_dir()
    assert client.delete(export).status_code == 204
    assert not directory.exists()
    for response in (client.get(export), client.delete(export), client.get(f"{export}/manifest")):
        expect_problem(response, 404, "export_not_found")
    assert client.get(address).status_code == 200


def test_it_goes_with_its_checkpoint(
    client: TestClient, database: Database, store: ArtifactStore, settings: Settings, address: str
) -> None:
    export = f"{address}/exports/{ask(client, address)['id']}"
    complete(database, store, settings)
    with database.transaction(write=True) as session:
        session.connection().exec_driver_sql("UPDATE jobs SET status = 'succeeded'")
    assert client.delete(address).status_code == 204
    expect_problem(client.get(export), 410, "checkpoint_expired")
    expect_problem(client.post(f"{address}/exports", json={"format": "q8_0"}), 410, "checkpoint_expired")
    assert list(settings.artifact_root.glob("jobs/*/attempt-1/*")) == []


def test_metrics_count_what_is_under_way(client: TestClient, address: str) -> None:
    ask(client, address)
    families = scrape(client)
    assert value(families, "pocl_exports", state="pending") == 1
    assert value(families, "pocl_exports", state="failed") == 0


def test_an_export_of_another_checkpoint_is_not_found(
    client: TestClient, database: Database, store: ArtifactStore, settings: Settings, address: str
) -> None:
    other = add_checkpoint(database, store, settings)
    export = ask(client, address)["id"]
    expect_problem(client.get(f"{other}/exports/{export}"), 404, "export_not_found")
    expect_problem(client.get(f"{address}/exports/nothing"), 404, "export_not_found")
    expect_problem(
        client.post("/v1/checkpoints/ckpt_00000000/exports", json={"format": "f16"}), 404, "checkpoint_not_found"
    )
