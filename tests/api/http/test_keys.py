"""Keys, projects, quotas and rate limits over HTTP."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from api.rate_limits import WrongKeyRates
from domain.settings import Settings
from tests.support.requests import AUTHORIZED, JSONL, LOOPBACK, expect_problem, jsonl, pointers, specification, submit


def create(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/keys", json={"name": "ci", "scopes": ["submit"], **fields})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    assert client.get(response.headers["location"]).json()["id"] == made["id"]
    return made


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_the_secret_is_shown_once(client: TestClient) -> None:
    made = create(client)
    assert client.get("/v1/jobs", headers=bearer(made["key"])).status_code == 200
    for path in ("/v1/keys", f"/v1/keys/{made['id']}"):
        text = client.get(path).text
        assert made["id"] in text
        assert made["key"].rpartition("_")[2] not in text
    rotated = client.post(f"/v1/keys/{made['id']}/rotate", json={"grace_seconds": 60}).json()
    for key in (made["key"], rotated["key"]):
        assert client.get("/v1/jobs", headers=bearer(key)).status_code == 200


def test_a_response_with_a_secret_is_not_kept_for_a_repetition(client: TestClient) -> None:
    response = client.post("/v1/keys", json={"name": "a", "scopes": ["read"]}, headers={"idempotency-key": "1"})
    assert pointers(expect_problem(response, 422, "invalid")) == ["/header/Idempotency-Key"]
    assert client.get("/v1/keys").json()["data"] == []


def test_a_revoked_key_stays_listed_and_a_deleted_one_does_not(client: TestClient) -> None:
    made = create(client)
    assert client.post(f"/v1/keys/{made['id']}/revoke").json()["revoked_at"] is not None
    assert [each["id"] for each in client.get("/v1/keys").json()["data"]] == [made["id"]]
    expect_problem(client.post(f"/v1/keys/{made['id']}/rotate"), 409, "key_not_active")
    assert client.delete(f"/v1/keys/{made['id']}").status_code == 204
    expect_problem(client.get(f"/v1/keys/{made['id']}"), 404, "key_not_found")
    expect_problem(client.get("/v1/jobs", headers=bearer(made["key"])), 401, "unauthenticated")


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"scopes": []}, "/scopes"),
        ({"scopes": ["root"]}, "/scopes/0"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "/expires_at"),
        ({"project": "nobody"}, "/project"),
        ({"scope": "read"}, "/scope"),
    ],
)
def test_a_wrong_key_to_be_is_refused_by_its_field(client: TestClient, fields: dict[str, Any], pointer: str) -> None:
    response = client.post("/v1/keys", json={"name": "ci", "scopes": ["read"], **fields})
    assert pointers(expect_problem(response, 422, "invalid")) == [pointer]


def test_a_project_has_rows_of_its_own_and_is_deleted_once_it_has_none(client: TestClient) -> None:
    made = client.post("/v1/projects", json={"id": "team", "max_jobs_queued": 0})
    assert made.headers["location"] == "/v1/projects/team"
    expect_problem(client.post("/v1/projects", json={"id": "team"}), 409, "project_exists")
    key = create(client, project="team", scopes=["admin"])
    headers = bearer(key["key"])
    dataset = client.post("/v1/datasets", content=jsonl(2), headers={**JSONL, **headers}).json()["id"]
    assert client.get("/v1/datasets").json()["data"] == []
    assert [each["id"] for each in client.get("/v1/projects", headers=headers).json()["data"]] == ["team"]
    detail = expect_problem(client.delete("/v1/projects/team"), 409, "project_is_needed")["detail"]
    assert "1 data sets, 1 keys" in detail
    assert client.delete(f"/v1/datasets/{dataset}", headers=headers).status_code == 204
    client.post(f"/v1/keys/{key['id']}/revoke")
    assert client.delete("/v1/projects/team").status_code == 204
    expect_problem(client.get("/v1/projects/team"), 404, "project_not_found")
    expect_problem(client.delete("/v1/projects/default"), 409, "project_is_needed")


def test_quotas_refuse_what_is_beyond_and_are_shown_with_their_use(client: TestClient, dataset: str) -> None:
    submit(client, dataset)
    quotas = {"max_jobs_queued": 1, "max_uploads": 0, "max_storage_bytes": 10**6, "max_jobs_running": 2}
    assert client.patch("/v1/projects/default", json=quotas).status_code == 200
    quota = client.get("/v1/quota").json()
    assert quota["jobs_queued"] == {"used": 1, "limit": 1}
    assert quota["jobs_running"] == {"used": 0, "limit": 2}
    assert quota["uploads"] == {"used": 0, "limit": 0}
    assert 0 < quota["storage_bytes"]["used"] < quota["storage_bytes"]["limit"] == 10**6
    submission = client.post("/v1/jobs", json={"spec": specification(dataset)})
    upload = client.post("/v1/datasets", content=jsonl(1), headers=JSONL)
    for response in (submission, upload):
        assert expect_problem(response, 429, "quota_exceeded")["retryable"] is True
        assert response.headers["retry-after"] == "5"
    assert client.patch("/v1/projects/default", json={"max_uploads": None}).json()["max_uploads"] is None
    assert client.post("/v1/datasets", content=jsonl(1), headers=JSONL).status_code == 201
    assert client.get("/v1/quota").json()["uploads"] == {"used": 0, "limit": None}


@pytest.fixture
def limited(settings: Settings) -> Iterator[TestClient]:
    """A service that admits three requests of a key a minute."""
    app = create_app(settings.model_copy(update={"requests_per_minute": 3}))
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False) as client:
        yield client


def test_a_key_beyond_its_rate_is_told_when_to_come_back(limited: TestClient, client: TestClient) -> None:
    other = bearer(create(client)["key"])
    for path in ("/v1/methods", "/v1/jobs/job_00000000", "/nothing"):
        assert limited.get(path, headers=AUTHORIZED).status_code in (200, 404)
    response = limited.get("/v1/methods", headers=AUTHORIZED)
    assert expect_problem(response, 429, "rate_limited")["retryable"] is True
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert response.headers["ratelimit-policy"] == '"key";q=3;w=60'
    assert response.headers["ratelimit"].startswith('"key";r=0;t=')
    assert limited.get("/v1/methods", headers=other).status_code == 200
    assert limited.get("/healthz").status_code == 200


def test_wrong_keys_of_an_address_are_slowed_down_and_known_keys_are_not(settings: Settings) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    app = create_app(settings, wrong_keys=WrongKeyRates(sleep))
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False) as client:
        client.get("/v1/methods", headers=AUTHORIZED)
        for _ in range(10):
            client.get("/v1/methods", headers=bearer("wrong"))
        client.get("/v1/methods")
        assert waits == []
        expect_problem(client.get("/v1/methods", headers=bearer("wrong")), 401, "unauthenticated")
        assert waits == [1.0]
        assert client.get("/v1/methods", headers=AUTHORIZED).status_code == 200
        assert waits == [1.0]
