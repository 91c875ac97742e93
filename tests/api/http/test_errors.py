"""Every error is a problem, says no more than it should, and has the request's id."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from api.app import create_app
from domain.artifacts import ArtifactStore
from domain.settings import Settings
from tests.support.requests import LOOPBACK, expect_problem, pointers


def post_json(client: TestClient, content: bytes | str, **headers: str) -> Any:
    return client.post("/v1/jobs", content=content, headers={"content-type": "application/json", **headers})


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/jobs/", "/v1/%00", "/v1/../etc/passwd", "/v1/jobs//"])
def test_an_address_where_nothing_is(bare: TestClient, path: str) -> None:
    found = expect_problem(bare.get(path), 404, "not_found")
    assert found["title"] == "Not Found"
    assert found["retryable"] is False


def test_a_method_that_an_address_does_not_have(bare: TestClient) -> None:
    for path, allowed in (
        ("/v1/methods", "GET"),
        ("/v1/jobs", "GET, POST"),
        ("/v1/jobs/job_00000000/cancel", "POST"),
    ):
        for method in ("DELETE", "OPTIONS", "TRACE", "BREW"):
            answer = bare.request(method, path)
            expect_problem(answer, 405, "method_not_allowed")
            assert answer.headers["allow"] == allowed


def test_an_address_without_parameters_is_not_taken_for_one_with(bare: TestClient) -> None:
    assert bare.options("/v1/jobs/validate").headers["allow"] == "POST"


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"\xff", b'{"spec": NaN}', b'{"spec": Infinity}', b'{"spec": 1e999}', b"'single'", b'"\\ud800"'],
)
def test_a_body_that_is_no_json(bare: TestClient, body: bytes) -> None:
    answer = post_json(bare, body)
    assert answer.json()["code"] in {"json_invalid", "invalid"}
    expect_problem(answer, 422 if body == b"" else 400, "invalid" if body == b"" else "json_invalid")


@pytest.mark.parametrize("depth", [33, 900, 5000, 400_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_nesting_is_bounded(bare: TestClient, depth: int, brackets: str) -> None:
    opening = '{"a":' if brackets == "{}" else "["
    body = f'{{"spec": {opening * depth}1{brackets[1] * depth}}}'[: 1 << 20]
    expect_problem(post_json(bare, body), 400, "json_invalid")


def test_a_nul_in_a_text_is_refused_wherever_it_is(bare: TestClient) -> None:
    for body in ({"name": "a\0"}, {"spec": {"teacher": {"path": ["\0"]}}}, {"labels": {"\0": "x"}}):
        expect_problem(post_json(bare, json.dumps(body)), 400, "json_invalid")


def test_a_body_over_the_limit(bare: TestClient) -> None:
    expect_problem(post_json(bare, b" " * (1 << 20) + b"{}"), 413, "body_too_large")
    # Also where its length was not declared.
    expect_problem(post_json(bare, iter([b" " * (1 << 20), b"{}"])), 413, "body_too_large")  # type: ignore[arg-type] # httpx takes an iterator, too.


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonl"])
def test_a_body_of_another_type(bare: TestClient, media_type: str) -> None:
    answer = bare.post("/v1/jobs", content=b'{"spec": {}}', headers={"content-type": media_type})
    expect_problem(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("body", "pointer", "code"),
    [
        ({}, "/spec", "missing"),
        ({"spec": {}, "nmae": "SECRET"}, "/nmae", "extra_forbidden"),
        ({"spec": {}, "priority": "SECRET"}, "/priority", "int_type"),
        ({"spec": {}, "priority": 101}, "/priority", "less_than_equal"),
        ({"spec": {}, "labels": {"a": 1}}, "/labels/a", "string_type"),
        ({"spec": {}, "labels": {"a/~b ": "SECRET"}}, "/labels/a~1~0b /[key]", "string_pattern_mismatch"),
        ({"spec": {}, "name": "x" * 201}, "/name", "string_too_long"),
        ({"spec": "SECRET"}, "/spec", "dict_type"),
        (["SECRET"], "", "model_attributes_type"),
    ],
)
def test_a_wrong_field_is_named_and_its_value_is_not_repeated(
    bare: TestClient, body: Any, pointer: str, code: str
) -> None:
    answer = bare.post("/v1/jobs", json=body)
    found = expect_problem(answer, 422, "invalid")
    assert [(error["pointer"], error["code"]) for error in found["errors"]] == [(pointer, code)]
    assert "SECRET" not in answer.text


def test_no_more_than_twenty_findings_of_bounded_length(bare: TestClient) -> None:
    found = expect_problem(bare.post("/v1/jobs", json={f"{n}{'x' * 5000}": 1 for n in range(50)}), 422, "invalid")
    assert len(found["errors"]) == 20
    assert max(map(len, pointers(found))) <= 256


@pytest.mark.parametrize("offered", ["abc-DEF_1.2", "x" * 64])
def test_a_sane_request_id_is_kept(bare: TestClient, offered: str) -> None:
    assert bare.get("/healthz", headers={"x-request-id": offered}).headers["x-request-id"] == offered
    assert expect_problem(bare.get("/no", headers={"x-request-id": offered}), 404, "not_found")["request_id"] == offered


@pytest.mark.parametrize("offered", ["", "x" * 65, "a b", "<script>", "a\tb", "é"])
def test_any_other_request_id_is_replaced(bare: TestClient, offered: str) -> None:
    given = bare.get("/healthz", headers={b"x-request-id": offered.encode("latin-1")}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", given)


class BrokenStore(ArtifactStore):
    """A store with a defect."""

    def publish_file(self, source: Path, key: str) -> Any:
        raise RuntimeError(f"SECRET {source} {key}")


def test_what_nobody_foresaw_is_logged_and_not_told(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    app = create_app(settings)
    app.state.store = BrokenStore(settings.artifact_root)
    row = b'{"instruction": "a", "output": "b"}'
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False) as client, capture_logs() as logged:
        answer = client.post("/v1/datasets", content=row, headers={"content-type": "application/jsonl"})
    expect_problem(answer, 500, "internal_error")
    assert "SECRET" not in answer.text
    assert str(tmp_path) not in answer.text
    assert [entry["event"] for entry in logged if entry["log_level"] == "error"] == ["request_failed"]


def test_a_database_that_does_not_answer_is_503_and_the_process_still_lives(tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "no.sqlite3"
    app = create_app(Settings(home=tmp_path, database_url=f"sqlite:///{gone}"))
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False) as client:
        assert client.get("/healthz").status_code == 200
        for path in ("/readyz", "/v1/jobs"):
            answer = client.get(path)
            assert expect_problem(answer, 503, "unavailable")["retryable"] is True
            assert answer.headers["retry-after"] == "5"
            assert "gone" not in answer.text
    with pytest.raises(OperationalError), app.state.database.transaction(write=False) as session:
        session.connection()


def test_no_answer_is_guessed_at(bare: TestClient) -> None:
    assert bare.get("/healthz").headers["x-content-type-options"] == "nosniff"
    assert bare.get("/nothing").headers["x-content-type-options"] == "nosniff"
