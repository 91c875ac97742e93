"""Authentication: by a key of the settings, of the first start or of the database, whose scopes say what it may do."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from starlette.testclient import TestClient

from api.app import create_app
from api.verified_keys import LIFE_SECONDS
from domain.db import Database, db_now
from domain.keys.models import SCOPES_INCLUDED, ApiKey, Scope
from domain.keys.repository import create_key, revoke_key, rotate_key
from domain.keys.tokens import parse_token
from domain.local_key import make_local_key
from domain.schema import upgrade
from domain.settings import Settings
from tests.support.requests import LOOPBACK, expect_problem
from tests.support.waiting import eventually

KEY = "a key of sixteen characters and more"


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[TestClient]:
    """A service with a key, reached under a public name."""
    settings = Settings(home=tmp_path / "keyed", api_key=SecretStr(KEY), host="0.0.0.0")
    upgrade(settings)
    app = create_app(settings)
    with TestClient(app, base_url="https://pocl.example", raise_server_exceptions=False) as client:
        yield client


def test_the_key_is_accepted(keyed: TestClient) -> None:
    assert keyed.get("/v1/methods", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        {},
        *(
            {"authorization": value}
            for value in (KEY, "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}")
        ),
    ],
)
def test_any_other_credential_is_refused_with_a_challenge(keyed: TestClient, header: dict[str, str]) -> None:
    response = keyed.get("/v1/methods", headers=header)
    expect_problem(response, 401, "unauthenticated")
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


def test_a_key_beyond_ascii_is_refused_as_wrong(keyed: TestClient) -> None:
    response = keyed.get("/v1/methods", headers={b"authorization": b"Bearer \xff\xfe"})
    expect_problem(response, 401, "unauthenticated")


def test_an_upload_without_the_key_is_refused_before_it_is_stored(keyed: TestClient, tmp_path: Path) -> None:
    response = keyed.post("/v1/datasets", content=b"{}", headers={"content-type": "application/jsonl"})
    expect_problem(response, 401, "unauthenticated")
    assert not (tmp_path / "keyed" / "uploads").exists()


def test_every_operation_but_the_probes_needs_the_key(keyed: TestClient) -> None:
    for path, operations in keyed.get("/openapi.json").json()["paths"].items():
        for method in operations:
            address = path.replace("{job_id}", "job_00000000").replace("{dataset_id}", "ds_00000000")
            address = address.replace("{checkpoint_id}", "ckpt_00000000").replace("{path}", "config.json")
            response = keyed.request(method, address, json={"spec": {}})
            is_guarded = path.startswith("/v1/") or path == "/metrics"
            assert (response.status_code == 401) == is_guarded, (method, path, response.status_code)


def test_the_probes_need_no_key(keyed: TestClient) -> None:
    assert keyed.get("/healthz").json() == {"status": "ok"}
    assert keyed.get("/readyz").json() == {"status": "ok", "wake_up": "no_scheduler"}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:9", "LOCALHOST", "[::1]:8000", "127.1.2.3"])
def test_loopback_names_are_served_with_the_key_of_the_first_start(bare: TestClient, host: str) -> None:
    assert bare.get("/v1/methods", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:8000",
        "",
        "[::1",
        "1.2.3.4",
        "user@localhost@evil",
    ],
)
@pytest.mark.parametrize("path", ["/v1/methods", "/healthz", "/nothing"])
def test_a_rebound_host_name_is_refused(bare: TestClient, host: str, path: str) -> None:
    expect_problem(bare.get(path, headers={"host": host}), 403, "origin_refused")


def test_an_address_with_nothing_needs_the_key_too(keyed: TestClient) -> None:
    for path in ("/nothing", "/ui/nothing", "/v1", "/v2/jobs", "/docsx", "/healthz/x"):
        expect_problem(keyed.get(path), 401, "unauthenticated")
        expect_problem(keyed.get(path, headers={"authorization": f"Bearer {KEY}"}), 404, "not_found")


def test_the_reference_needs_no_key(keyed: TestClient) -> None:
    for path in ("/docs", "/docs/start.js", "/openapi.json"):
        assert keyed.get(path).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example", "file://"])
def test_a_foreign_origin_is_refused(bare: TestClient, origin: str) -> None:
    expect_problem(bare.post("/v1/jobs", json={"spec": {}}, headers={"origin": origin}), 403, "origin_refused")


def test_only_the_origin_of_the_service_itself_is_served(bare: TestClient) -> None:
    for host in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000"):
        headers = {"host": host, "origin": f"http://{host}"}
        assert bare.get("/v1/methods", headers=headers).status_code == 200
    for origin in ("http://localhost:3000", "http://127.0.0.1", "http://localhost:8000", "http://127.0.0.1:8000.a"):
        response = bare.get("/v1/methods", headers={"host": "127.0.0.1:8000", "origin": origin})
        expect_problem(response, 403, "origin_refused")


def test_a_refusal_is_the_last_response_of_a_connection_whose_body_was_not_read(keyed: TestClient) -> None:
    headers = {"content-type": "application/json"}
    assert keyed.post("/v1/jobs", content=b"{}", headers=headers).headers["connection"] == "close"
    assert "connection" not in keyed.get("/v1/jobs").headers


def test_any_host_and_origin_are_served_with_the_key(keyed: TestClient) -> None:
    headers = {"authorization": f"Bearer {KEY}", "origin": "https://dashboard.example"}
    assert keyed.get("/v1/methods", headers=headers).status_code == 200


# --- The key of the first start -----------------------------------------------------------------------


def test_loopback_is_closed_to_programs_without_the_key_of_the_first_start(bare: TestClient) -> None:
    for header in ("", "Bearer", "Bearer pocl_local_" + "0" * 64, f"Bearer {KEY}"):
        expect_problem(bare.get("/v1/methods", headers={"authorization": header}), 401, "unauthenticated")


def test_beyond_loopback_the_same_key_is_served_under_any_name(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, host="0.0.0.0")
    headers = {"authorization": f"Bearer {make_local_key(tmp_path)}", "origin": "https://dashboard.example"}
    with TestClient(create_app(settings), base_url="https://pocl.example") as client:
        assert client.get("/v1/methods", headers=headers).status_code == 200
        expect_problem(client.get("/v1/methods"), 401, "unauthenticated")


# --- Keys of the database -----------------------------------------------------------------------------


@dataclass
class Service:
    """A service with keys of the database and a clock that the test sets."""

    client: TestClient
    database: Database
    now: float = 0.0

    def create(self, scope: Scope = "admin", **options: Any) -> tuple[str, str]:
        """The id of a new key, and its text."""
        with self.database.transaction(write=True) as session:
            key, token = create_key(session, project="default", name="test", scopes=[scope], **options)
        return key.id, str(token)

    def status(self, token: str, method: str = "GET", path: str = "/v1/methods") -> int:
        headers = {"authorization": f"Bearer {token}"}
        return int(self.client.request(method, path, headers=headers).status_code)

    def change(self, key_id: str, **columns: Any) -> None:
        with self.database.transaction(write=True) as session:
            session.execute(sa.update(ApiKey).where(ApiKey.id == key_id).values(**columns))


@pytest.fixture
def service(settings: Settings) -> Iterator[Service]:
    database = Database(settings.database_url)
    app = create_app(settings, clock=lambda: made.now)
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False) as client:
        made = Service(client, database)
        yield made
    database.close()


def test_a_key_of_the_database_is_accepted_until_it_is_revoked(service: Service) -> None:
    key_id, token = service.create()
    assert service.status(token) == 200
    with service.database.transaction(write=True) as session:
        revoke_key(session, key_id, project=None)
    service.now = LIFE_SECONDS
    assert service.status(token) == 401


def test_a_key_in_use_is_looked_up_beside_its_requests(service: Service) -> None:
    key_id, token = service.create()
    assert service.status(token) == 200
    service.change(key_id, revoked_at=datetime(2026, 1, 1, tzinfo=UTC))
    for _ in range(200):
        # The look-up begins with a request that is still served, and ends soon after it.
        service.now = LIFE_SECONDS / 2 + 0.1
        if service.status(token) == 401:
            break
    assert service.status(token) == 401


def test_a_key_expires_by_the_clock_of_the_database(service: Service) -> None:
    key_id, token = service.create()
    service.change(key_id, expires_at=db_now(60))
    assert service.status(token) == 200
    service.change(key_id, expires_at=db_now(-1))
    service.now = LIFE_SECONDS
    assert service.status(token) == 401


def test_after_a_rotation_both_secrets_are_accepted_for_the_grace_time(service: Service) -> None:
    key_id, old = service.create()
    with service.database.transaction(write=True) as session:
        _, token = rotate_key(session, key_id, grace_seconds=60, project=None)
    assert [service.status(text) for text in (old, str(token))] == [200, 200]
    service.change(key_id, previous_expires_at=db_now(-1))
    service.now = LIFE_SECONDS
    assert [service.status(text) for text in (old, str(token))] == [401, 200]


def test_no_secret_is_in_the_database(service: Service) -> None:
    key_id, token = service.create()
    with service.database.transaction(write=False) as session:
        row = session.get_one(ApiKey, key_id)
        values = [getattr(row, column.key) for column in ApiKey.__table__.columns]
    assert parse_token(token) is not None
    assert token.rpartition("_")[2] not in str(values)
    assert row.token_sha256 == hashlib.sha256(token.encode()).hexdigest()


@pytest.mark.parametrize("change", ["secret", "id", "length", "case"])
def test_a_key_that_differs_anywhere_is_refused(service: Service, change: str) -> None:
    _, token = service.create()
    head, key_id, secret = token.split("_")
    other = {
        "secret": f"{head}_{key_id}_{secret[:-1]}{'0' if secret[-1] != '0' else '1'}",
        "id": f"{head}_{key_id[:-1]}{'0' if key_id[-1] != '0' else '1'}_{secret}",
        "length": token[:-1],
        "case": token.upper(),
    }[change]
    assert (service.status(token), service.status(other)) == (200, 401)


def test_the_last_use_is_written_once_a_minute_and_beside_the_request(service: Service) -> None:
    key_id, token = service.create()
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        assert service.status(token) == 200
        eventually(lambda: used_at(service, key_id) is not None, what="the use is written")
        service.now = LIFE_SECONDS
        assert service.status(token) == 200
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert len([statement for statement in statements if statement.startswith("UPDATE api_keys")]) == 1


def used_at(service: Service, key_id: str) -> datetime | None:
    with service.database.transaction(write=False) as session:
        return session.get_one(ApiKey, key_id).last_used_at


def test_a_scope_is_refused_before_the_body_is_read_and_named(service: Service) -> None:
    _, token = service.create("read")
    response = service.client.post("/v1/jobs", content=b"{", headers={"authorization": f"Bearer {token}"})
    problem = expect_problem(response, 403, "insufficient_scope")
    assert "`submit`" in problem["detail"]
    assert response.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="submit"'
    assert response.headers["connection"] == "close"
    assert service.status(token) == 200


REQUESTS = (("GET", "/v1/methods"), ("POST", "/v1/jobs/job_00000000/cancel"), ("POST", "/v1/workers/none/drain"))


def test_scopes_include_those_before_them(service: Service) -> None:
    statuses = {
        scope: [service.status(service.create(scope)[1], method, path) for method, path in REQUESTS]
        for scope in SCOPES_INCLUDED
    }
    assert statuses == {"read": [200, 403, 403], "submit": [200, 404, 403], "admin": [200, 404, 404]}
