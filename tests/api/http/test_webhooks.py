"""Webhooks over HTTP: what is made, shown, refused, and what another project sees of it."""

from typing import Any

import pytest
from standardwebhooks import Webhook
from starlette.testclient import TestClient

from api.webhooks.messages import describe_messages, example_of
from domain.db import Database
from domain.projects.repository import create_project
from domain.webhooks.event_types import MESSAGES, WebhookEventType
from domain.webhooks.models import WebhookEndpoint
from domain.webhooks.outbox import empty_outbox
from domain.webhooks.repository import MAX_ENDPOINTS, add_endpoint, database_time
from tests.support.requests import expect_problem, pointers, submit

URL = "https://hooks.example/pocl"


def make(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/webhooks", json={"url": URL, **fields})
    assert response.status_code == 201, response.text
    assert response.headers["location"] == f"/v1/webhooks/{response.json()['id']}"
    made: dict[str, Any] = response.json()
    return made


def test_secret_is_shown_once(client: TestClient) -> None:
    made = make(client, description="alerts", events=["job.failed", "job.failed"], labels={"team": "search"})
    Webhook(made["secret"])
    assert made["secret"].startswith("whsec_")
    assert (made["status"], made["events"], made["labels"]) == ("enabled", ["job.failed"], {"team": "search"})
    shown = client.get(f"/v1/webhooks/{made['id']}").json()
    assert shown == {key: value for key, value in made.items() if key != "secret"}
    page = client.get("/v1/webhooks")
    assert page.json()["data"] == [shown]
    assert "whsec_" not in page.text


def test_types_of_a_newer_version_are_shown_while_the_service_is_upgraded(
    client: TestClient, database: Database
) -> None:
    made = make(client, events=["job.failed"])
    with database.transaction(write=True) as session:
        session.get_one(WebhookEndpoint, made["id"]).events = ["job.failed", "job.of_next_version"]
    for answer in (client.get("/v1/webhooks").json()["data"][0], client.get(f"/v1/webhooks/{made['id']}").json()):
        assert answer["events"] == ["job.failed", "job.of_next_version"]


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"url": "http://hooks.example/"}, "/url"),
        ({"url": "https://10.0.0.1/"}, "/url"),
        ({"url": "https://2130706433/"}, "/url"),
        ({"url": None}, "/url"),
        ({"events": []}, "/events"),
        ({"events": ["job.exploded"]}, "/events/0"),
        ({"labels": {"": "x"}}, "/labels//[key]"),
        ({"secret": "whsec_mine"}, "/secret"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(client: TestClient, fields: dict[str, Any], pointer: str) -> None:
    response = client.post("/v1/webhooks", json={"url": URL, **fields})
    assert response.status_code == 422
    assert pointers(response.json()) == [pointer]
    assert client.get("/v1/webhooks").json()["data"] == []


def test_webhook_is_changed_field_by_field(client: TestClient) -> None:
    made = make(client, events=["job.failed"], labels={"a": "b"})
    address = f"/v1/webhooks/{made['id']}"
    changed = client.patch(address, json={"url": "https://other.example/", "events": None}).json()
    assert (changed["url"], changed["events"], changed["labels"]) == ("https://other.example/", None, {"a": "b"})
    disabled = client.patch(address, json={"status": "disabled"}).json()
    assert (disabled["status"], disabled["disabled_reason"]) == ("disabled", "by_client")
    expect_problem(client.post(f"{address}/test"), 409, "webhook_is_disabled")
    assert client.patch(address, json={"status": "enabled"}).json()["disabled_reason"] is None
    expect_problem(client.patch(address, json={"url": "https://127.0.0.1/"}), 422, "webhook_url_invalid")
    expect_problem(client.patch(address, json={"labels": None}), 422, "invalid")
    assert client.delete(address).status_code == 204
    expect_problem(client.get(address), 404, "webhook_not_found")


def test_secret_is_rotated_with_a_time_of_grace(client: TestClient) -> None:
    made = make(client)
    address = f"/v1/webhooks/{made['id']}"
    rotated = client.post(f"{address}/rotate-secret").json()
    assert rotated["secret"] not in (made["secret"], None)
    assert rotated["former_secret_until"] is not None
    at_once = client.post(f"{address}/rotate-secret", json={"grace_seconds": 0}).json()
    assert at_once["former_secret_until"] is None
    assert "secret" not in client.get(address).json()
    expect_problem(client.post(f"{address}/rotate-secret", json={"grace_seconds": 10**7}), 422, "invalid")


def test_number_of_webhooks_is_bounded(client: TestClient) -> None:
    for _ in range(MAX_ENDPOINTS):
        make(client)
    expect_problem(client.post("/v1/webhooks", json={"url": URL}), 409, "too_many_webhooks")


def test_request_that_is_repeated_under_a_key_makes_one_webhook(client: TestClient) -> None:
    headers = {"idempotency-key": "one"}
    first, second = (client.post("/v1/webhooks", json={"url": URL}, headers=headers).json() for _ in range(2))
    assert first == second
    assert len(client.get("/v1/webhooks").json()["data"]) == 1


def test_deliveries_are_listed_by_page_and_state_and_repeated(
    client: TestClient, database: Database, dataset: str
) -> None:
    made = make(client)
    address = f"/v1/webhooks/{made['id']}"
    tests = [client.post(f"{address}/test") for _ in range(3)]
    assert {response.status_code for response in tests} == {202}
    job = submit(client, dataset)
    with database.transaction(write=True) as session:
        empty_outbox(session, now=database_time(session))
    page = client.get(f"{address}/deliveries", params={"limit": 3}).json()
    newest = page["data"][0]
    assert (newest["type"], newest["job_id"], newest["status"]) == ("job.queued", job["id"], "pending")
    rest = client.get(f"{address}/deliveries", params={"after": page["last_id"]}).json()
    assert [item["id"] for item in [*page["data"][1:], *rest["data"]]] == [
        response.json()["id"] for response in reversed(tests)
    ]
    assert client.get(f"{address}/deliveries", params={"status": "failed"}).json()["data"] == []
    shown = client.get(f"{address}/deliveries/{newest['id']}").json()
    MESSAGES["job.queued"].model_validate_json(shown["body"])
    again = client.post(f"{address}/deliveries/{newest['id']}/redeliver")
    assert (again.status_code, again.json()["id"]) == (202, newest["id"])
    expect_problem(client.get(f"{address}/deliveries/msg_00000000"), 404, "delivery_not_found")
    expect_problem(client.get(f"{address}/deliveries/%00"), 404, "delivery_not_found")


def test_webhook_of_another_project_is_not_there(client: TestClient, database: Database) -> None:
    with database.transaction(write=True) as session:
        create_project(session, "other")
        other = add_endpoint(session, project="other", url=URL, description="", events=None, labels={})
    address = f"/v1/webhooks/{other.id}"
    assert client.get("/v1/webhooks").json()["data"] == []
    for method, path in [
        ("GET", ""),
        ("PATCH", ""),
        ("DELETE", ""),
        ("POST", "/test"),
        ("POST", "/rotate-secret"),
        ("GET", "/deliveries"),
        ("GET", "/deliveries/msg_00000000"),
        ("POST", "/deliveries/msg_00000000/redeliver"),
    ]:
        body: dict[str, Any] | None = {} if method == "PATCH" else None
        expect_problem(client.request(method, f"{address}{path}", json=body), 404, "webhook_not_found")
    with database.transaction(write=False) as session:
        assert session.get(WebhookEndpoint, other.id) is not None


def test_every_type_of_message_has_a_schema_and_an_example_that_keeps_to_it() -> None:
    operations, schemas = describe_messages()
    assert set(operations) == set(MESSAGES) == {*WebhookEventType, "webhook.test"}
    for message_type, path in operations.items():
        content = path["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"]["$ref"].removeprefix("#/components/schemas/") in schemas
        MESSAGES[message_type].model_validate(content["example"])
    assert example_of(WebhookEventType.FAILED)["data"]["reason"]["hint"]
