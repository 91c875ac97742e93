"""No response has a header field of the service's own that the OpenAPI document does not name."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.clients.generated_client import DOCUMENT
from tests.support.requests import specification, upload

OF_HTTP = frozenset(
    {
        *("content-length", "content-type", "cache-control", "date", "server", "vary", "connection", "allow"),
        *("last-modified", "transfer-encoding", "content-security-policy", "x-content-type-options"),
        *("referrer-policy", "cross-origin-resource-policy", "x-accel-buffering"),
    }
)
"""Fields that every server has, or that say something to browsers alone."""


def documented(document: dict[str, Any], operation_id: str, status: int) -> set[str]:
    (operation,) = (
        operation
        for path in document["paths"].values()
        for operation in path.values()
        if operation["operationId"] == operation_id
    )
    response: dict[str, Any] = operation["responses"][str(status)]
    if "$ref" in response:
        response = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
    return {name.lower() for name in response["headers"]}


@pytest.fixture
def job(client: TestClient) -> str:
    response = client.post("/v1/jobs", json={"spec": specification(upload(client))})
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def test_responses_have_the_header_fields_that_are_documented(client: TestClient, job: str) -> None:
    document = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    etag = client.get(f"/v1/jobs/{job}").headers["etag"]
    spec = specification(upload(client))
    sent: dict[str, Any] = {"headers": {"idempotency-key": "once"}, "json": {"spec": spec}}
    answers = [
        ("get_job", client.get(f"/v1/jobs/{job}"), 200),
        ("get_job", client.get(f"/v1/jobs/{job}", headers={"if-none-match": etag}), 304),
        ("get_job", client.get("/v1/jobs/job_00000000"), 404),
        ("get_job", client.get(f"/v1/jobs/{job}", headers={"authorization": "Bearer no"}), 401),
        ("create_job", client.post("/v1/jobs", **sent), 201),
        ("create_job", client.post("/v1/jobs", **sent), 201),
        ("create_job", client.post("/v1/jobs", json={}), 422),
        ("get_job_logs", client.get(f"/v1/jobs/{job}/logs"), 200),
        ("cancel_job", client.post(f"/v1/jobs/{job}/cancel"), 202),
        ("upload_dataset", client.post("/v1/datasets", content=b"{}", headers={"content-type": "text/css"}), 415),
        ("list_jobs", client.get("/v1/jobs"), 200),
    ]
    for operation, response, status in answers:
        assert response.status_code == status, (operation, response.text)
        assert set(response.headers) - OF_HTTP <= documented(document, operation, status), operation
