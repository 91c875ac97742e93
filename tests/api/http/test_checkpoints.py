"""Downloads of checkpoints and artifacts: resumable, verifiable, and confined to the artifact store."""

import base64
import hashlib
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.client_shares import ClientShares
from domain.artifacts import ArtifactStore
from domain.checkpoints.models import Checkpoint
from domain.db import Database
from domain.jobs.engine_logs import LogChunk, append_log
from domain.jobs.event_recorder import add_artifact, add_checkpoint
from domain.jobs.leases import Claim, settle
from domain.jobs.states import AttemptOutcome
from domain.settings import Settings
from pocl.storage.manifest import MANIFEST, sha256_of, write_manifest
from tests.support.requests import AUTHORIZED, JSONL, LOOPBACK, expect_problem, jsonl, submit
from tests.support.worker_actions import claim_queued_job

WEIGHTS = random.Random(0).randbytes(200_000)
FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}", "folder/käse-1.txt": b"cheese", "empty": b""}


@pytest.fixture
def claim(client: TestClient, database: Database, dataset: str) -> Claim:
    """A claim of a worker on a job."""
    submit(client, dataset)
    return claim_queued_job(database)


@pytest.fixture
def stored(app: FastAPI, database: Database, claim: Claim, tmp_path: Path) -> Checkpoint:
    """A checkpoint of that job, with its files in the store."""
    directory = tmp_path / "checkpoint"
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    write_manifest(directory)
    store: ArtifactStore = app.state.store
    key = f"jobs/{claim.job_id}/checkpoints/final"
    size = store.publish(directory, key).size_bytes
    with database.transaction(write=True) as session:
        return add_checkpoint(
            session, claim, kind="final", step=9, stage=1, store_key=key, size_bytes=size,
            manifest_sha256=sha256_of(directory / MANIFEST),
        )  # fmt: skip


@pytest.fixture
def files(stored: Checkpoint) -> str:
    return f"/v1/checkpoints/{stored.id}/files"


def test_a_checkpoint_is_described_and_listed_under_its_job(client: TestClient, stored: Checkpoint) -> None:
    shown = client.get(f"/v1/checkpoints/{stored.id}").json()
    assert (shown["kind"], shown["step"], shown["stage"], shown["job_id"]) == ("final", 9, 1, stored.job_id)
    page = client.get(f"/v1/jobs/{stored.job_id}/checkpoints").json()
    assert (page["data"], page["has_more"], page["last_id"]) == ([shown], False, stored.id)


def test_the_manifest_names_every_file_with_size_and_digest(client: TestClient, stored: Checkpoint) -> None:
    listed = {file["path"]: file for file in client.get(f"/v1/checkpoints/{stored.id}/manifest").json()["files"]}
    assert set(listed) == {*FILES, MANIFEST}
    for name, content in FILES.items():
        assert (listed[name]["size"], listed[name]["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_every_file_arrives_as_the_manifest_says(client: TestClient, files: str) -> None:
    for name, content in FILES.items():
        response = client.get(f"{files}/{name}")
        digest = hashlib.sha256(content)
        assert (response.status_code, response.content) == (200, content)
        assert response.headers["etag"] == f'"{digest.hexdigest()}"'
        assert response.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
        assert response.headers["content-length"] == str(len(content))
        assert response.headers["content-disposition"].startswith("attachment")
        assert response.headers["accept-ranges"] == "bytes"


def test_head_has_the_headers_of_get_and_no_body(client: TestClient, files: str) -> None:
    got, headed = client.get(f"{files}/model.safetensors"), client.head(f"{files}/model.safetensors")
    assert headed.content == b""
    for name in ("etag", "repr-digest", "content-length", "content-type", "accept-ranges"):
        assert headed.headers[name] == got.headers[name]


def test_a_range_is_served_as_partial_content(client: TestClient, files: str) -> None:
    size = len(WEIGHTS)
    for requested, first, last in [
        ("bytes=0-0", 0, 0),
        ("bytes=100-70000", 100, 70000),
        (f"bytes={size - 1}-", size - 1, size - 1),
        ("bytes=-10", size - 10, size - 1),
        (f"bytes=5-{size * 2}", 5, size - 1),
        (f"bytes=-{size * 2}", 0, size - 1),
    ]:
        response = client.get(f"{files}/model.safetensors", headers={"range": requested})
        assert response.status_code == 206, requested
        assert response.content == WEIGHTS[first : last + 1]
        assert response.headers["content-range"] == f"bytes {first}-{last}/{size}"
        assert response.headers["content-length"] == str(last - first + 1)


def test_a_malformed_range_is_ignored(client: TestClient, files: str) -> None:
    for requested in (
        "bytes=",
        "bytes=-",
        "bytes=9-3",
        "bytes=a-b",
        "pages=1-2",
        "0-5",
        "bytes=0-1,5-9",
        "bytes=" + "9" * 99,
    ):
        response = client.get(f"{files}/model.safetensors", headers={"range": requested})
        assert (response.status_code, response.content) == (200, WEIGHTS), requested


def test_a_range_beyond_the_end_is_refused_with_the_size(client: TestClient, files: str) -> None:
    for name, requested in (
        ("model.safetensors", f"bytes={len(WEIGHTS)}-"),
        ("model.safetensors", "bytes=-0"),
        ("empty", "bytes=0-"),
        ("empty", "bytes=-5"),
    ):
        response = client.get(f"{files}/{name}", headers={"range": requested})
        expect_problem(response, 416, "range_not_satisfiable")
        assert response.headers["content-range"] == f"bytes */{len(FILES[name])}"


def test_a_download_resumes_only_with_the_same_file(client: TestClient, files: str) -> None:
    address = f"{files}/model.safetensors"
    etag = client.head(address).headers["etag"]
    start = WEIGHTS[:777]
    rest = client.get(address, headers={"range": "bytes=777-", "if-range": etag})
    assert (rest.status_code, start + rest.content) == (206, WEIGHTS)
    for other in ('"another"', f"W/{etag}", "Wed, 21 Oct 2026 07:28:00 GMT"):
        whole = client.get(address, headers={"range": "bytes=777-", "if-range": other})
        assert (whole.status_code, whole.content) == (200, WEIGHTS)


def test_a_file_that_the_client_has_is_not_modified(client: TestClient, files: str) -> None:
    etag = client.head(f"{files}/config.json").headers["etag"]
    for address, status in ((f"{files}/config.json", 304), (f"{files}/model.safetensors", 200)):
        assert client.get(address, headers={"if-none-match": etag}).status_code == status


ESCAPES = (
    "", ".", "../config.json", "%2e%2e", "..%2fconfig.json", "%2e%2e%2f%2e%2e%2fconfig.json", "/etc/passwd",
    "%2fetc%2fpasswd", "folder/%2e%2e/config.json", "folder", "%2e/config.json", "config.json/", "config.json%00",
    "%00", "//config.json", "..\\config.json", "%5c..%5cconfig.json", "..%252fconfig.json", "CONFIG.JSON",
    "model.safetensors.tmp", "%ff", "link", "x" * 5000,
)  # fmt: skip


def test_no_path_leads_out_of_the_checkpoint(
    client: TestClient, settings: Settings, stored: Checkpoint, files: str
) -> None:
    (settings.artifact_root / stored.store_key / "link").symlink_to("/etc/passwd")
    for path in ESCAPES:
        response = client.get(f"{files}/{path}")
        assert expect_problem(response, 404, response.json()["code"])["code"] in {"file_not_found", "not_found"}, path


def test_a_listed_file_that_became_a_link_is_not_followed(
    client: TestClient, settings: Settings, stored: Checkpoint, files: str
) -> None:
    listed = settings.artifact_root / stored.store_key / "config.json"
    listed.unlink()
    listed.symlink_to("/etc/passwd")
    expect_problem(client.get(f"{files}/config.json"), 404, "file_not_found")


def test_a_file_of_another_size_is_not_served_under_its_digest(
    client: TestClient, settings: Settings, stored: Checkpoint, files: str
) -> None:
    (settings.artifact_root / stored.store_key / "config.json").write_bytes(b"{} ")
    expect_problem(client.get(f"{files}/config.json"), 500, "artifact_damaged")
    (settings.artifact_root / stored.store_key / MANIFEST).write_bytes(b"no manifest")
    expect_problem(client.get(f"/v1/checkpoints/{stored.id}/manifest"), 500, "artifact_damaged")


def test_missing_files_are_not_found(client: TestClient, app: FastAPI, stored: Checkpoint, files: str) -> None:
    app.state.store.remove(stored.store_key)
    expect_problem(client.get(f"{files}/config.json"), 404, "file_not_found")
    expect_problem(client.get(f"/v1/checkpoints/{stored.id}/manifest"), 404, "file_not_found")


def test_transfers_are_shared_by_clients(client: TestClient, app: FastAPI, settings: Settings, files: str) -> None:
    shares: ClientShares = app.state.transfers
    with ExitStack() as held:
        for _ in range(settings.max_transfers // 2):
            held.enter_context(shares.hold("static@testclient"))
        for refused in (
            client.get(f"{files}/config.json"),
            client.post("/v1/datasets", content=jsonl(1), headers=JSONL),
        ):
            assert expect_problem(refused, 429, "client_share_exceeded")["retryable"] is True
            assert refused.headers["retry-after"] == "5"
        # Others are served, and so is what transfers no file.
        other = TestClient(app, base_url=LOOPBACK, client=("10.0.0.9", 1), headers=AUTHORIZED)
        assert other.get(f"{files}/config.json").content == FILES["config.json"]
        assert client.get("/v1/jobs").status_code == 200
    assert client.get(f"{files}/config.json").status_code == 200
    assert shares.total == 0


def test_an_unknown_checkpoint_is_not_found(client: TestClient) -> None:
    for unknown in ("ckpt_00000000000000000000000000", "ckpt_%00", "job_00000000", "x"):
        for resource in ("", "/manifest", "/files/config.json"):
            expect_problem(client.get(f"/v1/checkpoints/{unknown}{resource}"), 404, "checkpoint_not_found")


def test_artifacts_of_a_job_are_served_under_their_media_types(
    client: TestClient, app: FastAPI, database: Database, claim: Claim, tmp_path: Path
) -> None:
    contents = {"ranking": (b'{"rank": 1}\n', "jsonl"), "result": (b"{}", "json"), "report": (b"<h1>", "html")}
    store: ArtifactStore = app.state.store
    for kind, (content, suffix) in contents.items():
        file = tmp_path / f"{kind}.{suffix}"
        file.write_bytes(content)
        key = f"jobs/{claim.job_id}/{file.name}"
        stored = store.publish_file(file, key)
        with database.transaction(write=True) as session:
            add_artifact(session, claim, kind=kind, store_key=key, size_bytes=stored.size, sha256=stored.sha256)
    for kind, (content, _) in contents.items():
        response = client.get(f"/v1/jobs/{claim.job_id}/{kind}")
        assert (response.status_code, response.content) == (200, content)
        assert response.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    page = client.get(f"/v1/jobs/{claim.job_id}/report").headers
    assert (page["content-type"], page["content-disposition"]) == (
        "text/html; charset=utf-8",
        'inline; filename="report.html"',
    )
    assert "default-src 'none'" in page["content-security-policy"]


def test_a_retry_that_did_not_rank_has_the_ranking_of_its_nearest_ancestor(
    client: TestClient, app: FastAPI, database: Database, claim: Claim, tmp_path: Path
) -> None:
    ranking = tmp_path / "ranking.jsonl"
    ranking.write_bytes(b'{"rank": 1}\n')
    key = f"jobs/{claim.job_id}/ranking.jsonl"
    stored = app.state.store.publish_file(ranking, key)
    with database.transaction(write=True) as session:
        add_artifact(session, claim, kind="ranking", store_key=key, size_bytes=stored.size, sha256=stored.sha256)
        settle(session, claim, AttemptOutcome.succeeded())
    child = client.post(f"/v1/jobs/{claim.job_id}/retry", json={"start": "start"}).json()["id"]
    client.post(f"/v1/jobs/{child}/cancel")
    grandchild = client.post(f"/v1/jobs/{child}/retry").json()["id"]
    for job_id in (claim.job_id, child, grandchild):
        assert client.get(f"/v1/jobs/{job_id}/ranking").content == ranking.read_bytes()
    expect_problem(client.get(f"/v1/jobs/{child}/report"), 404, "artifact_not_produced")
    expect_problem(client.get(f"/v1/jobs/{grandchild}/report"), 404, "artifact_not_ready")


def test_the_log_is_that_of_the_requested_attempt(client: TestClient, database: Database, claim: Claim) -> None:
    with database.transaction(write=True) as session:
        append_log(session, claim, [LogChunk(0, "loading <käse>\n".encode())], max_bytes=1000)
    logs = f"/v1/jobs/{claim.job_id}/logs"
    parameters: tuple[dict[str, Any], ...] = ({}, {"attempt": 1})
    for each in parameters:
        assert client.get(logs, params=each).text == "loading <käse>\n"
    expect_problem(client.get(logs, params={"attempt": 2}), 404, "attempt_not_found")
    (attempt,) = client.get(f"/v1/jobs/{claim.job_id}/attempts").json()["data"]
    assert (attempt["id"], attempt["worker"], attempt["end"], attempt["ended_at"]) == (1, "w1", None, None)
