"""Every error is a problem details response, reveals nothing internal, and has the id of the request."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from api.app import create_app
from domain.artifacts import ArtifactStore
from domain.database_errors import SENTENCES, DatabaseFault, DatabaseUnavailable
from domain.db import Database
from domain.schema import upgrade
from domain.settings import Settings
from tests.support.requests import AUTHORIZED, KEY, LOOPBACK, expect_problem, pointers


def post_json(client: TestClient, content: bytes | str, **headers: str) -> Any:
    return client.post("/v1/jobs", content=content, headers={"content-type": "application/json", **headers})


@pytest.mark.parametrize(
    "path", ["/ui", "/ui/nothing", "/v1", "/v1/nothing", "/v1/jobs/", "/v1/%00", "/v1/../etc/passwd", "/v1/jobs//"]
)
def test_an_unknown_path_is_not_found(bare: TestClient, path: str) -> None:
    problem = expect_problem(bare.get(path), 404, "not_found")
    assert problem["title"] == "Not Found"
    assert problem["retryable"] is False


def test_a_method_that_a_path_lacks_is_not_allowed(bare: TestClient) -> None:
    for path, allowed in (
        ("/v1/methods", "GET, HEAD"),
        ("/v1/jobs", "GET, HEAD, POST"),
        ("/v1/jobs/job_00000000/cancel", "POST"),
    ):
        for method in ("DELETE", "OPTIONS", "TRACE", "BREW"):
            response = bare.request(method, path)
            expect_problem(response, 405, "method_not_allowed")
            assert response.headers["allow"] == allowed


def test_allowed_methods_of_a_path_without_parameters_are_its_own(bare: TestClient) -> None:
    for method in ("OPTIONS", "GET", "HEAD", "PUT", "PATCH", "DELETE"):
        response = bare.request(method, "/v1/jobs/validate")
        assert (response.status_code, response.headers["allow"]) == (405, "POST"), method


def test_allow_of_the_conversations_of_a_model_does_not_take_them_for_a_model(client: TestClient) -> None:
    assert client.put("/v1/models/some/model").headers["allow"] == "GET, HEAD"
    assert client.put("/v1/models/some/model/chat/completions").headers["allow"] == "POST"


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"\xff", b'{"spec": NaN}', b'{"spec": Infinity}', b'{"spec": 1e999}', b"'single'", b'"\\ud800"'],
)
def test_malformed_json_is_refused(bare: TestClient, body: bytes) -> None:
    response = post_json(bare, body)
    assert response.json()["code"] in {"json_invalid", "invalid"}
    expect_problem(response, 422 if body == b"" else 400, "invalid" if body == b"" else "json_invalid")


@pytest.mark.parametrize("depth", [33, 900, 5000, 400_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_nesting_is_bounded(bare: TestClient, depth: int, brackets: str) -> None:
    opening = '{"a":' if brackets == "{}" else "["
    body = f'{{"spec": {opening * depth}1{brackets[1] * depth}}}'[: 1 << 20]
    expect_problem(post_json(bare, body), 400, "json_invalid")


def test_a_nul_in_any_text_is_refused(bare: TestClient) -> None:
    for body in ({"name": "a\0"}, {"spec": {"teacher": {"path": ["\0"]}}}, {"labels": {"\0": "x"}}):
        expect_problem(post_json(bare, json.dumps(body)), 400, "json_invalid")


def test_a_body_over_the_limit_is_refused(bare: TestClient) -> None:
    expect_problem(post_json(bare, b" " * (1 << 20) + b"{}"), 413, "body_too_large")
    # Also without a declared length.
    expect_problem(post_json(bare, iter([b" " * (1 << 20), b"{}"])), 413, "body_too_large")  # type: ignore[arg-type] # httpx takes an iterator, too.


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonl"])
def test_a_body_of_another_media_type_is_refused(bare: TestClient, media_type: str) -> None:
    response = bare.post("/v1/jobs", content=b'{"spec": {}}', headers={"content-type": media_type})
    expect_problem(response, 415, "unsupported_media_type")


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
    response = bare.post("/v1/jobs", json=body)
    problem = expect_problem(response, 422, "invalid")
    assert [(error["pointer"], error["code"]) for error in problem["errors"]] == [(pointer, code)]
    assert "SECRET" not in response.text


@pytest.mark.parametrize(
    ("path", "body", "meant"),
    [
        ("/v1/jobs", {"spec": {}, "nmae": 1}, "name"),
        ("/v1/jobs", {"spec": {}, "limits": {"max_runtime_second": 1}}, "max_runtime_seconds"),
        ("/v1/jobs", {"spec": {}, "trackers": [{"kind": "tensorbord"}]}, "tensorboard"),
        ("/v1/jobs", {"spec": {}, "trackers": [{"kind": "mlflow", "experimant": 1}]}, "experiment"),
        ("/v1/jobs/job_00000000/pause", {"at": "stage-end"}, "stage_end"),
        ("/v1/jobs/job_00000000/retry", {"strat": "stage"}, "start"),
        ("/v1/webhooks", {"url": "https://example.com", "event": []}, "events"),
        ("/v1/keys", {"name": "a", "scops": []}, "scopes"),
    ],
)
def test_the_nearest_name_is_named(bare: TestClient, path: str, body: Any, meant: str) -> None:
    problem = expect_problem(bare.post(path, json=body), 422, "invalid")
    assert any(error["detail"].endswith(f"did you mean `{meant}`?") for error in problem["errors"])


def test_the_message_says_in_one_text_what_is_wrong(bare: TestClient) -> None:
    problem = expect_problem(bare.post("/v1/jobs", json={"spec": {}, "nmae": 1, "priority": "x"}), 422, "invalid")
    assert problem["message"].startswith(problem["detail"])
    for error in problem["errors"]:
        assert f"{error['pointer']}: {error['detail']}" in problem["message"]
    plain = expect_problem(bare.get("/v1/nothing"), 404, "not_found")
    assert plain["message"] == plain["detail"]
    many = expect_problem(bare.post("/v1/jobs", json={f"{n}{'x' * 5000}": 1 for n in range(50)}), 422, "invalid")
    assert len(many["message"]) < 2000


def test_field_errors_are_bounded_in_number_and_length(bare: TestClient) -> None:
    problem = expect_problem(bare.post("/v1/jobs", json={f"{n}{'x' * 5000}": 1 for n in range(50)}), 422, "invalid")
    assert len(problem["errors"]) == 20
    assert max(map(len, pointers(problem))) <= 256


@pytest.mark.parametrize("sent_id", ["abc-DEF_1.2", "x" * 64])
def test_a_valid_request_id_is_kept(bare: TestClient, sent_id: str) -> None:
    assert bare.get("/healthz", headers={"x-request-id": sent_id}).headers["x-request-id"] == sent_id
    assert expect_problem(bare.get("/no", headers={"x-request-id": sent_id}), 404, "not_found")["request_id"] == sent_id


@pytest.mark.parametrize("sent_id", ["", "x" * 65, "a b", "<script>", "a\tb", "é"])
def test_an_invalid_request_id_is_replaced(bare: TestClient, sent_id: str) -> None:
    request_id = bare.get("/healthz", headers={b"x-request-id": sent_id.encode("latin-1")}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", request_id)


class BrokenStore(ArtifactStore):
    """A store with a defect."""

    def publish_file(self, source: Path, key: str, *, link: bool = False, keep: bool = False) -> Any:
        raise RuntimeError(f"SECRET {source} {key} {link} {keep}")


def test_an_unforeseen_error_is_logged_and_not_revealed(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, api_key=SecretStr(KEY))
    app = create_app(settings)
    upgrade(settings)
    app.state.store = BrokenStore(settings.artifact_root)
    row = b'{"instruction": "a", "output": "b"}'
    with (
        TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, headers=AUTHORIZED) as client,
        capture_logs() as logged,
    ):
        response = client.post("/v1/datasets", content=row, headers={"content-type": "application/jsonl"})
    expect_problem(response, 500, "internal_error")
    assert "SECRET" not in response.text
    assert str(tmp_path) not in response.text
    assert [entry["event"] for entry in logged if entry["log_level"] == "error"] == ["request_failed"]


@pytest.mark.system
def test_an_unavailable_database_is_503_and_the_process_stays_alive(tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "no.sqlite3"
    app = create_app(Settings(home=tmp_path, api_key=SecretStr(KEY), database_url=f"sqlite:///{gone}"))
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, headers=AUTHORIZED) as client:
        assert client.get("/healthz").status_code == 200
        for path in ("/readyz", "/v1/jobs"):
            response = client.get(path)
            assert expect_problem(response, 503, "unavailable")["retryable"] is True
            assert response.headers["retry-after"] == "5"
            assert "gone" not in response.text
    with pytest.raises(DatabaseUnavailable), app.state.database.transaction(write=False) as session:
        session.connection()


def test_log_lines_of_a_request_have_its_id_and_its_job(tmp_path: Path) -> None:
    app = create_app(
        Settings(home=tmp_path, api_key=SecretStr(KEY), database_url=f"sqlite:///{tmp_path}/missing/no.sqlite3")
    )
    job_id = "job_00000000"
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, headers=AUTHORIZED) as client:
        for path, logged_job in (
            (f"/v1/jobs/{job_id}", job_id),
            (f"/v1/jobs/{job_id}/stages", job_id),
            ("/v1/jobs", None),
        ):
            with capture_logs(processors=[merge_contextvars]) as logged:
                response = client.get(path)
            (entry,) = logged
            assert (entry["event"], entry.get("job_id")) == ("database_unavailable", logged_job)
            assert entry["request_id"] == response.headers["x-request-id"]


def test_responses_forbid_content_sniffing(bare: TestClient) -> None:
    assert bare.get("/healthz").headers["x-content-type-options"] == "nosniff"
    assert bare.get("/nothing").headers["x-content-type-options"] == "nosniff"


class FaultyDatabase(Database):
    """A database whose transactions fail."""

    def __init__(self, url: str, fault: DatabaseFault) -> None:
        super().__init__(url)
        self.fault = fault

    def transaction(self, *, write: bool) -> NoReturn:
        raise DatabaseUnavailable(self.fault, f"secret /path of {write}")


@pytest.mark.parametrize("fault", list(DatabaseFault))
def test_every_fault_of_the_database_is_said_and_never_a_500(tmp_path: Path, fault: DatabaseFault) -> None:
    settings = Settings(home=tmp_path, api_key=SecretStr(KEY))
    app = create_app(settings)
    app.state.database.close()
    app.state.database = FaultyDatabase(settings.database_url, fault)
    status, code = {
        DatabaseFault.FULL: (507, "storage_full"),
        DatabaseFault.DAMAGED: (503, "database_damaged"),
    }.get(fault, (503, "unavailable"))
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, headers=AUTHORIZED) as client:
        for response in (
            client.get("/v1/jobs"),
            client.get("/v1/jobs/job_00000000/events"),
            client.patch("/v1/jobs/job_00000000", json={"priority": 1}),
            client.post("/v1/jobs/job_00000000/cancel", headers={"idempotency-key": "one"}),
        ):
            problem = expect_problem(response, status, code)
            assert problem["retryable"] is (fault is not DatabaseFault.DAMAGED)
            assert ("retry-after" in response.headers) is problem["retryable"]
            assert problem["detail"] == SENTENCES[fault] or fault is DatabaseFault.DAMAGED
            assert "secret" not in response.text
