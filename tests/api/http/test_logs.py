"""The access log and the audit log: who asked for what, and no secret."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from api.access_log import AccessLog
from api.app import create_app
from domain.logs import LogThrottle
from domain.settings import Settings
from tests.support.requests import JSONL, LOOPBACK, jsonl

KEY = "a-key-of-sixteen-characters"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


class Lines:
    """What the access log wrote."""

    def __init__(self) -> None:
        self.content = b""

    def write(self, lines: bytes) -> None:
        self.content += lines

    def parse(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.content.splitlines()]


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def logged(settings: Settings, lines: Lines) -> Iterator[TestClient]:
    """A service with a key that logs to `lines`."""
    app = create_app(settings.model_copy(update={"api_key": SecretStr(KEY)}), AccessLog(lines.write))
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, client=("10.1.2.3", 5)) as client:
        yield client
    app.state.database.close()


def flush(client: TestClient) -> None:
    app: Any = client.app
    app.state.access_log.flush()


def test_each_response_has_a_line(logged: TestClient, lines: Lines) -> None:
    created = logged.post("/v1/datasets?name=SECRET", content=jsonl(2), headers={**JSONL, **AUTHORIZED})
    logged.get("/v1/jobs/job_00000000", headers={**AUTHORIZED, "x-request-id": "mine"})
    logged.get("/v1/jobs/job_00000000/stages?SECRET=1", headers=AUTHORIZED)
    logged.get("/v1/jobs?limit=1&token=SECRET")
    logged.get("/nothing/at/all?SECRET", headers=AUTHORIZED)
    logged.get("/healthz")
    flush(logged)
    assert b"SECRET" not in lines.content
    assert KEY.encode() not in lines.content
    parsed = lines.parse()
    assert [(line["method"], line["route"], line["status"], line["key"]) for line in parsed] == [
        ("POST", "/v1/datasets", 201, "static"),
        ("GET", "/v1/jobs/{job_id}", 404, "static"),
        ("GET", "/v1/jobs/{job_id}/stages", 422, "static"),
        ("GET", None, 401, None),
        ("GET", None, 404, "static"),
        ("GET", "/healthz", 200, None),
    ]
    assert parsed[0]["bytes_in"] == len(jsonl(2))
    assert parsed[0]["bytes_out"] == len(created.content)
    assert parsed[0]["request_id"] == created.headers["x-request-id"]
    assert parsed[1]["request_id"] == "mine"
    assert parsed[3]["path"] == "/v1/jobs"
    assert parsed[4]["path"] == "/nothing/at/all"
    assert {line["client"] for line in parsed} == {"10.1.2.3"}
    assert all(line["milliseconds"] >= 0 and line["event"] == "request" and line["timestamp"] for line in parsed)


def test_a_log_of_errors_leaves_out_what_went_well(settings: Settings, lines: Lines) -> None:
    app = create_app(settings, AccessLog(lines.write, only_errors=True))
    with TestClient(app, base_url=LOOPBACK, headers={"authorization": "Bearer another"}) as client:
        client.get("/healthz")
        client.get("/nothing")
    app.state.database.close()
    assert [line["status"] for line in lines.parse()] == [401]


def test_changes_are_audited(logged: TestClient) -> None:
    with capture_logs() as entries:
        dataset = logged.post("/v1/datasets", content=jsonl(2), headers={**JSONL, **AUTHORIZED}).json()["id"]
        logged.get(f"/v1/datasets/{dataset}", headers=AUTHORIZED)
        logged.delete(f"/v1/datasets/{dataset}", headers=AUTHORIZED)
        logged.post("/v1/jobs/job_00000000/cancel", headers=AUTHORIZED)
    audited = [entry for entry in entries if entry["event"] == "audit"]
    assert [(each["action"], each["objects"], each["status"]) for each in audited] == [
        ("upload_dataset", {"created": dataset}, 201),
        ("delete_dataset", {"dataset_id": dataset}, 204),
        ("cancel_job", {"job_id": "job_00000000"}, 404),
    ]
    assert {(each["key"], each["client"]) for each in audited} == {("static", "10.1.2.3")}


def test_refused_authentications_are_logged_with_their_reason(logged: TestClient) -> None:
    attempts = [{}, {"authorization": "Basic SECRET"}, {"authorization": "Bearer SECRET-SECRET-SECRET"}]
    with capture_logs() as entries:
        for headers in attempts:
            logged.delete("/v1/datasets/ds_00000000", headers=headers)
        for _ in range(30):
            logged.get("/v1/jobs")
    assert [entry["reason"] for entry in entries[:3]] == ["no_credentials", "no_bearer_key", "wrong_key"]
    assert {entry["event"] for entry in entries} == {"authentication_refused"}
    assert len(entries) < 20
    assert "SECRET" not in str(entries)


def test_lines_of_a_kind_are_bounded_and_counted() -> None:
    now = 0.0
    throttle = LogThrottle(lines=2, seconds=60, clock=lambda: now)
    assert [throttle.admit("a") for _ in range(4)] == [0, 0, None, None]
    assert throttle.admit("b") == 0
    now = 60.0
    assert [throttle.admit("a") for _ in range(3)] == [2, 0, None]


def test_lines_are_written_whole_and_together(tmp_path: Path) -> None:
    written: list[bytes] = []
    log = AccessLog(written.append)

    async def add() -> None:
        for status in (200, None, 500):
            log.add(status, {"path": str(tmp_path)})
        log.flush()

    asyncio.run(add())
    (batch,) = written
    assert [json.loads(line)["status"] for line in batch.splitlines()] == [200, None, 500]
    assert [json.loads(line)["level"] for line in batch.splitlines()] == ["info", "info", "warning"]
