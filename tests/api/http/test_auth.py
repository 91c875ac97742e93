"""Authentication: by the key, or without one of programs on this machine alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from starlette.testclient import TestClient

from api.app import create_app
from domain.schema import upgrade
from domain.settings import Settings
from tests.support.requests import expect_problem

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
            assert (response.status_code == 401) == path.startswith("/v1/"), (method, path, response.status_code)


def test_the_probes_need_no_key(keyed: TestClient) -> None:
    assert keyed.get("/healthz").json() == {"status": "ok"}
    assert keyed.get("/readyz").json() == {"status": "ok", "wake_up": "no_scheduler"}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "pocl.example", "::"])
def test_listening_beyond_loopback_requires_a_key(tmp_path: Path, host: str) -> None:
    with pytest.raises(ValidationError, match="POCL_API_KEY"):
        Settings(home=tmp_path, host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:9", "LOCALHOST", "[::1]:8000", "127.1.2.3"])
def test_loopback_names_are_served_without_a_key(bare: TestClient, host: str) -> None:
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
    for path in ("/", "/nothing", "/v1", "/v2/jobs", "/docsx", "/healthz/x"):
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
