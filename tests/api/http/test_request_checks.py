"""What an address, a method or a body must be like: query parameters, HEAD, codings, byte order marks, prefixes."""

import codecs
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from domain.settings import Settings
from tests.support.requests import AUTHORIZED, JSONL, LOOPBACK, expect_problem, jsonl, pointers, specification, upload


@pytest.mark.parametrize(
    ("address", "pointer", "hint"),
    [
        ("/v1/jobs?statsu=failed", "/query/statsu", "did you mean `status`?"),
        ("/v1/jobs?limit=1&Limit=2", "/query/Limit", "did you mean `limit`?"),
        ("/v1/jobs?nonsense", "/query/nonsense", "there are `after`, `label`, `limit`, `status`."),
        ("/v1/methods?x=", "/query/x", "it takes none."),
        ("/v1/jobs/job_00000000?zz%2Fz~z=1", "/query/zz~1z~0z", "there are `wait`."),
        ("/v1/jobs/job_00000000/metrics?name=loss", "/query/name", "did you mean `names`?"),
        ("/v1/datasets/ds_00000000/preview?model=random&row=1", "/query/row", "did you mean `rows`?"),
    ],
)
def test_a_query_parameter_that_no_operation_reads_is_refused(
    bare: TestClient, address: str, pointer: str, hint: str
) -> None:
    problem = expect_problem(bare.get(address), 422, "invalid")
    assert pointers(problem) == [pointer]
    assert problem["errors"][0]["code"] == "unknown"
    assert problem["errors"][0]["detail"].endswith(hint)


def test_an_unknown_parameter_of_a_post_is_refused(bare: TestClient) -> None:
    problem = expect_problem(bare.post("/v1/datasets?nam=x", content=jsonl(1), headers=JSONL), 422, "invalid")
    assert pointers(problem) == ["/query/nam"]


def test_a_parameter_that_is_given_twice_is_refused_where_one_is_read(client: TestClient) -> None:
    problem = expect_problem(client.get("/v1/jobs?limit=5&limit=6"), 422, "invalid")
    assert [(each["pointer"], each["code"]) for each in problem["errors"]] == [("/query/limit", "ambiguous")]
    assert client.get("/v1/jobs?status=failed&status=queued").status_code == 200


def test_every_known_parameter_passes(bare: TestClient) -> None:
    """No operation refuses a name that the OpenAPI document gives it."""
    for path, operations in bare.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            names = [each["name"] for each in operation.get("parameters", []) if each["in"] == "query"]
            address = path.replace("{job_id}", "job_00000000").replace("{dataset_id}", "ds_00000000")
            address = address.replace("{checkpoint_id}", "ckpt_00000000").replace("{path}", "x")
            if path.startswith("/v1/") and names:
                response = bare.request(method, address, params=[(name, "!") for name in names], json={})
                codes = {error["code"] for error in response.json().get("errors", [])}
                assert "unknown" not in codes, (method, path)


def test_head_is_answered_as_get_is(client: TestClient) -> None:
    upload(client)
    paths = client.get("/openapi.json").json()["paths"]
    for path in ["/docs", "/openapi.json", *(path for path, operations in paths.items() if "get" in operations)]:
        address = path.replace("{job_id}", "job_00000000").replace("{dataset_id}", "ds_00000000")
        address = address.replace("{checkpoint_id}", "ckpt_00000000").replace("{path}", "x")
        head, got = client.head(address), client.get(address)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers.get("content-type") == got.headers.get("content-type"), path


def test_allow_names_head_beside_get(bare: TestClient) -> None:
    for path in ("/healthz", "/v1/jobs/job_00000000"):
        methods = bare.request("TRACE", path).headers["allow"].split(", ")
        assert {"GET", "HEAD"} <= set(methods)


@pytest.mark.parametrize("coding", ["gzip", "br", "gzip, identity", "x"])
@pytest.mark.parametrize(
    ("path", "media_type"), [("/v1/jobs/validate", "application/json"), ("/v1/datasets", "application/jsonl")]
)
def test_a_body_in_a_content_coding_is_refused(client: TestClient, path: str, media_type: str, coding: str) -> None:
    headers = {"content-type": media_type, "content-encoding": coding}
    response = client.post(path, content=gzip.compress(b"{}"), headers=headers)
    expect_problem(response, 415, "content_encoding_unsupported")
    assert response.headers["accept-encoding"] == "identity"


def test_identity_is_no_coding(client: TestClient) -> None:
    response = client.post("/v1/datasets", content=jsonl(1), headers={**JSONL, "content-encoding": "identity"})
    assert response.status_code == 201


def test_json_may_begin_with_a_byte_order_mark(client: TestClient, dataset: str) -> None:
    body = json.dumps({"spec": specification(dataset)}).encode()
    headers = {"content-type": "application/json"}
    assert client.post("/v1/jobs/validate", content=codecs.BOM_UTF8 + body, headers=headers).status_code == 200
    for encoding in ("utf-16", "utf-32"):
        refused = client.post("/v1/jobs/validate", content=body.decode().encode(encoding), headers=headers)
        assert "send it in UTF-8" in expect_problem(refused, 400, "json_invalid")["detail"]


@pytest.fixture
def prefixed(settings: Settings) -> Iterator[TestClient]:
    """A service behind a proxy that serves it under /pocl."""
    app = create_app(settings.model_copy(update={"root_path": "/pocl"}))
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, headers=AUTHORIZED) as client:
        yield client
    app.state.database.close()


@pytest.mark.parametrize("cut", [True, False], ids=["cut off by the proxy", "passed on by the proxy"])
def test_addresses_lie_below_the_prefix(prefixed: TestClient, cut: bool) -> None:
    base = "" if cut else "/pocl"
    response = prefixed.post(f"{base}/v1/datasets", content=jsonl(1), headers=JSONL)
    location = response.headers["location"]
    assert location == f"/pocl/v1/datasets/{response.json()['id']}"
    assert prefixed.get(location.removeprefix("/pocl") if cut else location).status_code == 200
    assert prefixed.get(f"{base}/openapi.json").json()["servers"][0]["url"] == "/pocl"
    assert prefixed.get(f"{base}/healthz").status_code == 200
    expect_problem(prefixed.get(f"{base}/v1/jobs/job_00000000"), 404, "job_not_found")
    assert prefixed.request("TRACE", f"{base}/v1/methods").headers["allow"] == "GET, HEAD"


def test_paths_beside_the_prefix_lead_nowhere(prefixed: TestClient) -> None:
    for path in ("/poclv1/methods", "/pocl", "/pocl/pocl/v1/methods", "/other/v1/methods"):
        expect_problem(prefixed.get(path), 404, "not_found")


def test_without_a_prefix_the_server_is_the_root(tmp_path: Path) -> None:
    app: Any = create_app(Settings(home=tmp_path))
    assert [server["url"] for server in app.openapi()["servers"]] == ["/"]
    app.state.database.close()
