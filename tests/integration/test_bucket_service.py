"""Jobs and downloads with the artifacts in a bucket: workers of other machines, a store that is away, redirects."""

import hashlib
import io
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from api.app import create_app
from domain.artifacts import ArtifactNotFound
from domain.bucket.location import Bucket
from domain.bucket.store import BucketArtifactStore
from domain.jobs.states import JobStatus
from domain.jobs.usage import storage_bytes
from domain.settings import Settings
from domain.workers.models import Worker
from pocl.storage.manifest import write_manifest
from tests.support.harness import PROJECT, ServiceHarness
from tests.support.requests import AUTHORIZED, KEY, LOOPBACK, expect_problem
from tests.support.rows import save_checkpoint
from tests.support.s3_server import BUCKET, READER, Relay, S3Server, relay_to
from tests.support.waiting import eventually
from tests.support.worker_actions import claim_queued_job
from tests.worker.exports.conftest import ExportedCheckpoints
from tests.worker.test_supervisor import concurrently, wait_for_step
from worker.garbage import remove_deleted_checkpoints

pytestmark = pytest.mark.system

PUBLIC = "https://files.example.com"
WEIGHTS = bytes(range(256)) * 24_000


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    (tmp_path / "test.db").write_bytes(sqlite_template.read_bytes())
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture
def machines(sqlite_url: str, bucket_address: str, tmp_path: Path) -> Iterator[list[ServiceHarness]]:
    """Two machines that share a database and a bucket, and no disk."""
    made = [ServiceHarness(tmp_path / name, sqlite_url, artifact_store=bucket_address) for name in ("one", "two")]
    yield made
    for each in made:
        each.close()


def open_client(harness: ServiceHarness, **changes: object) -> TestClient:
    values = {**harness.settings.model_dump(exclude={"artifact_root", "model_roots"}), **changes}
    values |= {"api_key": SecretStr(KEY), "encoding_check_seconds": 0, "home": harness.home / "api"}
    settings = Settings(**values)
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    app = create_app(settings)
    return TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, headers=AUTHORIZED, follow_redirects=False)


def test_a_job_goes_on_on_another_machine_and_its_files_are_served(
    machines: list[ServiceHarness], s3_server: S3Server, bucket_address: str
) -> None:
    first, second = machines
    job = first.submit()
    stop = threading.Event()
    with concurrently(lambda: wait_for_step(first, job, 4), stop.set):
        assert first.supervisor("--hold", "5", should_stop=stop.is_set).work_one() is JobStatus.QUEUED
    assert second.supervisor(name="second").work_one() is JobStatus.SUCCEEDED
    started = [event.data for event in second.events(job, "run_started")]
    assert started[0]["resumed_from_step"] is None
    assert started[-1]["resumed_from_step"] >= 2
    stored = second.checkpoints(job)
    with second.database.transaction(write=False) as session:
        sizes = [second.store.manifest(row.store_key).size_bytes for row in stored]
        assert sizes == [row.size_bytes for row in stored]
        assert storage_bytes(session, PROJECT)[PROJECT] > sum(sizes)
    with open_client(second) as client:
        for row in stored:
            listed = client.get(f"/v1/checkpoints/{row.id}/manifest").json()["files"]
            archive = client.get(f"/v1/checkpoints/{row.id}/archive")
            assert archive.headers["content-length"] == str(len(archive.content))
            with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
                for file in listed:
                    content = client.get(f"/v1/checkpoints/{row.id}/files/{file['path']}").content
                    assert hashlib.sha256(content).hexdigest() == file["sha256"]
                    assert tar.extractfile(f"{row.id}/{file['path']}").read() == content  # type: ignore[union-attr]
        assert client.get(f"/v1/jobs/{job}/ranking").status_code == 200
        assert client.delete(f"/v1/checkpoints/{stored[0].id}").status_code == 204
        prefix = bucket_address.removeprefix(f"s3://{BUCKET}/")
        assert s3_server.list_names(f"{prefix}/{stored[0].store_key}") == []
        expect_problem(client.get(f"/v1/checkpoints/{stored[0].id}/archive"), 410, "checkpoint_expired")
        # Without the bucket a deletion stands, and garbage collection makes up for it.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
            with open_client(second) as lost:
                lost.app.state.store = BucketArtifactStore(  # type: ignore[attr-defined]
                    second.home / "lost", Bucket.parse(bucket_address), max_retries=0
                )
                response = lost.get(f"/v1/checkpoints/{stored[1].id}/manifest")
                assert expect_problem(response, 503, "artifact_store_unavailable")["retryable"] is True
                assert lost.delete(f"/v1/checkpoints/{stored[1].id}").status_code == 204
        assert s3_server.list_names(f"{prefix}/{stored[1].store_key}") != []
        remove_deleted_checkpoints(second.database, second.store)
        assert s3_server.list_names(f"{prefix}/{stored[1].store_key}") == []


def lose_the_store(harness: ServiceHarness, relay: Relay, job: str, gate: Path) -> None:
    """Cut the relay while the engine waits at its gate, and open that; return once the worker has asked often."""
    wait_for_step(harness, job, 4)
    relay.cut()
    refused = relay.refused
    gate.touch()
    eventually(lambda: relay.refused >= refused + 5, within=120)


def test_a_store_that_is_away_costs_no_attempt(
    machines: list[ServiceHarness], s3_server: S3Server, bucket_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = machines[0]
    job = harness.submit()
    with relay_to(s3_server.endpoint) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
        store = BucketArtifactStore(harness.home / "copies", Bucket.parse(bucket_address), max_retries=0)
        gate = harness.home / "gate"
        supervisor = replace(harness.supervisor("--hold", "5", "--gate", str(gate)), store=store)
        relay.cut()
        assert supervisor.work_one() is None
        assert (harness.job(job).status, harness.attempts(job)) == (JobStatus.QUEUED, [])
        relay.restore()

        def lose_and_find_the_store() -> None:
            lose_the_store(harness, relay, job, gate)
            relay.restore()

        with concurrently(lose_and_find_the_store):
            assert supervisor.work_one() is JobStatus.SUCCEEDED
    assert [attempt.end for attempt in harness.attempts(job)] == ["succeeded"]
    with harness.database.transaction(write=False) as session:
        assert session.get(Worker, "tester") is None or session.get_one(Worker, "tester").quarantined_at is None
    for row in harness.checkpoints(job):
        assert harness.store.manifest(row.store_key).size_bytes == row.size_bytes


def test_a_job_is_cancelled_while_its_worker_waits_for_the_store(
    machines: list[ServiceHarness], s3_server: S3Server, bucket_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = machines[0]
    job = harness.submit()
    with relay_to(s3_server.endpoint) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
        store = BucketArtifactStore(harness.home / "copies", Bucket.parse(bucket_address), max_retries=0)
        gate = harness.home / "gate"
        supervisor = harness.supervisor("--hold", "5", "--gate", str(gate))
        settings = supervisor.settings.model_copy(update={"heartbeat_seconds": 0.2})
        supervisor = replace(supervisor, store=store, settings=settings)

        def lose_the_store_and_cancel() -> None:
            lose_the_store(harness, relay, job, gate)
            harness.cancel(job)

        with concurrently(lose_the_store_and_cancel):
            assert supervisor.work_one() is JobStatus.CANCELLED


def test_a_worker_whose_bucket_refuses_it_says_so_and_claims_nothing(
    machines: list[ServiceHarness], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = machines[0].submit()
    for name, value in s3_server.environment(READER).items():
        monkeypatch.setenv(name, value)
    assert machines[1].supervisor().work_one() is None
    assert (machines[1].job(job).status, machines[1].attempts(job)) == (JobStatus.QUEUED, [])
    with machines[1].database.transaction(write=False) as session:
        assert "refuses the credentials" in str(session.get_one(Worker, "tester").quarantine_reason)


@pytest.fixture
def large_checkpoint(machines: list[ServiceHarness], tmp_path: Path) -> str:
    """The id of a checkpoint with a file of six megabytes."""
    harness = machines[0]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    write_manifest(tmp_path / "model")
    harness.submit()
    row = save_checkpoint(harness.database, claim_queued_job(harness.database), "final", 1)
    harness.store.publish(tmp_path / "model", row.store_key)
    return row.id


def test_large_files_are_had_from_the_bucket_by_presigned_addresses(
    machines: list[ServiceHarness], large_checkpoint: str
) -> None:
    path = f"/v1/checkpoints/{large_checkpoint}/files"
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    with open_client(machines[1]) as client:
        response = client.get(f"{path}/model.safetensors")
        assert (response.status_code, response.content) == (307, b"")
        assert (response.headers["x-file-size"], response.headers["etag"]) == (str(len(WEIGHTS)), f'"{digest}"')
        assert response.headers["cache-control"] == "no-store"
        address = response.headers["location"]
        assert parse_qs(urlsplit(address).query)["X-Amz-Expires"] == ["900"]
        edges = [len(WEIGHTS) * part // 8 for part in range(9)]

        def fetch(part: int) -> bytes:
            wanted = {"Range": f"bytes={edges[part]}-{edges[part + 1] - 1}"}
            with urllib.request.urlopen(urllib.request.Request(address, headers=wanted)) as found:
                assert found.status == 206
                return bytes(found.read())

        with ThreadPoolExecutor(8) as threads:
            assert hashlib.sha256(b"".join(threads.map(fetch, range(8)))).hexdigest() == digest
        headed = client.head(f"{path}/model.safetensors")
        assert (headed.status_code, headed.headers["x-file-size"]) == (307, str(len(WEIGHTS)))
        with urllib.request.urlopen(urllib.request.Request(headed.headers["location"], method="HEAD")) as found:
            assert found.headers["content-length"] == str(len(WEIGHTS))
        # A small one comes at once, and what the client has is not sent.
        small = client.get(f"{path}/config.json")
        assert (small.status_code, small.content) == (200, b"{}")
        assert client.head(f"{path}/config.json").headers["content-length"] == "2"
        had = client.get(f"{path}/model.safetensors", headers={"if-none-match": f'"{digest}"'})
        assert had.status_code == 304
        expect_problem(client.get(f"{path}/../x"), 404, "not_found")
        expect_problem(client.get(f"{path}/none"), 404, "file_not_found")
    with open_client(machines[1], artifact_public_endpoint=PUBLIC) as client:
        location = client.get(f"{path}/model.safetensors").headers["location"]
        assert location.startswith(f"{PUBLIC}/{BUCKET}/")
    with open_client(machines[1], artifact_downloads="proxy") as client:
        whole = client.get(f"{path}/model.safetensors")
        assert (whole.status_code, hashlib.sha256(whole.content).hexdigest()) == (200, digest)
        part = client.get(f"{path}/model.safetensors", headers={"range": "bytes=5000000-", "if-range": f'"{digest}"'})
        assert (part.status_code, part.content) == (206, WEIGHTS[5_000_000:])


def test_an_export_that_another_machine_made_is_had_by_a_presigned_address(
    machines: list[ServiceHarness], tmp_path: Path
) -> None:
    first, second = machines
    for name in ("source", "asks", "makes"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / "model.safetensors").write_bytes(WEIGHTS)
    asking = ExportedCheckpoints(first, tmp_path / "asks")
    checkpoint = asking.store(tmp_path / "source")
    export = asking.ask(checkpoint)
    making = ExportedCheckpoints(second, tmp_path / "makes")
    row = making.turn(making.exporter())
    assert row.state == "complete"
    address = f"/v1/checkpoints/{checkpoint}/exports/{export}"
    with open_client(first) as client:
        response = client.get(f"{address}/files/model-q8_0.gguf")
        assert (response.status_code, response.headers["x-file-size"]) == (307, str(len(WEIGHTS)))
        with urllib.request.urlopen(response.headers["location"]) as served:
            assert served.read() == WEIGHTS
        assert client.get(f"{address}/files/Modelfile").content == b"FROM it\n"
        assert client.delete(address).status_code == 204
    with pytest.raises(ArtifactNotFound):
        first.store.manifest(str(row.store_key))
