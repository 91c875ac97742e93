"""The service as a process of its own, on a real socket."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path

import httpx2
import pytest

from domain.db import Database
from domain.jobs.repository import list_jobs
from domain.settings import Settings
from tests.support.api_process import ROOT, environment, serving
from tests.support.requests import AUTHORIZED, JSONL, jsonl, specification
from tests.support.waiting import eventually

KEY_LINE = f"authorization: {AUTHORIZED['authorization']}\r\n"


def run(command: str, settings: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "api", command], env=dict(settings), cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the service of this module has its home and its log."""
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def server(shared_database_url: str, place: Path) -> Iterator[str]:
    """The address of a running service."""
    (place / "home").mkdir(mode=0o700, exist_ok=True)
    with serving(place / "home", place / "log", database_url=shared_database_url) as served:
        yield served.address


def test_dataset_is_uploaded_and_job_submitted(server: str) -> None:
    # A submission encodes samples in a process of its own, which a busy machine is slow to start.
    with httpx2.Client(base_url=server, headers=AUTHORIZED, timeout=120) as client:
        assert client.get("/readyz").status_code == 200
        dataset = client.post("/v1/datasets", content=jsonl(8), headers=JSONL).json()["id"]
        created = client.post("/v1/jobs", json={"spec": specification(dataset)})
        assert created.status_code == 201
        assert client.get(created.headers["location"]).json()["status"] == "queued"


def test_aborted_upload_leaves_nothing(server: str, place: Path) -> None:
    before = httpx2.get(f"{server}/v1/datasets", headers=AUTHORIZED).json()["data"]
    host, port = server.removeprefix("http://").split(":")
    head = (
        f"POST /v1/datasets HTTP/1.1\r\nhost: {host}\r\n{KEY_LINE}content-type: application/jsonl\r\n"
        "content-length: 9999\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + jsonl(3))
        spool = place / "home" / "uploads"
        eventually(lambda: spool.is_dir() and any(spool.iterdir()), what="the upload has begun")
    eventually(lambda: not any(spool.iterdir()), what="the upload is taken back")
    assert httpx2.get(f"{server}/v1/datasets", headers=AUTHORIZED).json()["data"] == before


def test_reading_of_an_upload_ends_with_its_client_and_delays_nobody(server: str, place: Path) -> None:
    before = httpx2.get(f"{server}/v1/datasets", headers=AUTHORIZED).json()["data"]
    host, port = server.removeprefix("http://").split(":")
    # Each row is refused by itself: that takes ten seconds and more.
    body = b"{}\n" * (4 << 20)
    head = f"POST /v1/datasets HTTP/1.1\r\nhost: {host}\r\n{KEY_LINE}content-type: application/jsonl\r\n"
    spool = place / "home" / "uploads"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: any(spool.glob("*.samples")), what="the file is read")
        assert httpx2.get(f"{server}/v1/datasets", headers=AUTHORIZED).json()["data"] == before
        assert any(spool.glob("*.samples"))
    eventually(lambda: not any(spool.iterdir()), what="the upload is taken back")
    assert httpx2.get(f"{server}/v1/datasets", headers=AUTHORIZED).json()["data"] == before


def test_path_traversal_in_a_raw_request_is_not_found(server: str) -> None:
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        # Most clients normalize the path before they send it, but not all.
        request = (
            f"GET /v1/checkpoints/ckpt_00000000/files/../../../../etc/passwd HTTP/1.0\r\nhost: {host}\r\n{KEY_LINE}\r\n"
        )
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"application/problem+json" in answer


@pytest.mark.parametrize("path", ["/v1/datasets/ds_00000000/preview?model=", "/v1/", "/healthz?q=%07"])
def test_url_that_is_too_long_is_answered_with_problem_details(server: str, path: str) -> None:
    # On one connection, which such a URL does not end.
    connection = HTTPConnection(server.removeprefix("http://"))
    codes = []
    for length in (65535, 65536, 1 << 20, 65535):
        connection.request("GET", path + "x" * (length - len(path)), headers=AUTHORIZED)
        response = connection.getresponse()
        body = response.read()
        if response.status == 414:
            assert response.headers["content-type"] == "application/problem+json"
        codes.append(json.loads(body)["code"] if response.status == 414 else "")
    connection.close()
    assert codes == ["", "uri_too_long", "uri_too_long", ""]


def test_migrate_creates_the_schema_and_is_idempotent(home: Path) -> None:
    assert [run("migrate", environment(home)).returncode for _ in range(2)] == [0, 0]
    database = Database(Settings(home=home).database_url)
    with database.transaction(write=False) as session:
        assert list_jobs(session, "default", limit=1).rows == []
    database.close()


def test_wrong_setting_is_named_without_its_value(home: Path) -> None:
    ended = run("serve", environment(home, api_key="SECRET", port="SECRET"))
    assert ended.returncode == 2
    assert "POCL_API_KEY" in ended.stderr
    assert "POCL_PORT" in ended.stderr
    assert "SECRET" not in ended.stderr
