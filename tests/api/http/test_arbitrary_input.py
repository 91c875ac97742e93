"""Any input is accepted or refused for a reason; none breaks the service."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from pocl.spec import DistillationSpec
from tests.support.requests import TINY_MODEL, expect_problem, specification

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
FIELDS = sorted(DistillationSpec.model_fields)
SPECIFICATIONS = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, JSON))
FUZZED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def post(client: TestClient, body: Any) -> None:
    response = client.post("/v1/jobs", content=json.dumps(body), headers={"content-type": "application/json"})
    if response.status_code == 201:
        return
    code = response.json()["code"]
    assert response.status_code < 500, (body, response.text)
    expect_problem(response, response.status_code, code)


@FUZZED
@given(body=JSON)
def test_any_json_is_accepted_or_refused(client: TestClient, body: Any) -> None:
    post(client, body)


@FUZZED
@given(spec=SPECIFICATIONS)
def test_any_value_of_any_field_is_accepted_or_refused(client: TestClient, dataset: str, spec: dict[str, Any]) -> None:
    post(client, {"spec": specification(dataset) | spec})


@FUZZED
@given(name=st.text(), labels=st.dictionaries(st.text(), st.text()), priority=st.integers() | st.floats())
def test_any_name_label_and_priority_is_accepted_or_refused(
    client: TestClient, dataset: str, name: str, labels: dict[str, str], priority: float
) -> None:
    post(client, {"spec": specification(dataset), "name": name, "labels": labels, "priority": priority})


@FUZZED
@given(path=st.text())
def test_any_path_of_a_model_is_accepted_or_refused(client: TestClient, dataset: str, path: str) -> None:
    post(client, {"spec": specification(dataset) | {"teacher": {"path": path}, "student": TINY_MODEL}})


@FUZZED
@given(body=st.binary(max_size=200) | st.text().map(str.encode))
def test_any_bytes_of_an_upload_are_accepted_or_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/datasets", content=body, headers={"content-type": "application/jsonl"})
    assert response.status_code in (201, 422), response.text


@FUZZED
@given(parameters=st.dictionaries(st.sampled_from(["limit", "after", "status", "label"]), st.text(), min_size=1))
def test_any_filter_is_accepted_or_refused(client: TestClient, parameters: dict[str, str]) -> None:
    response = client.get("/v1/jobs", params=parameters)
    assert response.status_code in (200, 422), response.text


@pytest.mark.parametrize("number", ["1e400", "-0", "123456789012345678901234567890", "1.0", "1e1", '"1"', "true"])
def test_any_spelling_of_a_number_is_accepted_or_refused(client: TestClient, dataset: str, number: str) -> None:
    spec = json.dumps(specification(dataset))[:-1] + f', "seed": {number}}}'
    response = client.post("/v1/jobs", content=f'{{"spec": {spec}}}', headers={"content-type": "application/json"})
    assert response.status_code in (201, 400, 422), response.text
