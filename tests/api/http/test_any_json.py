"""Whatever is posted is accepted or refused for a reason; it never breaks the service."""

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
MANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def post(client: TestClient, body: Any) -> None:
    answer = client.post("/v1/jobs", content=json.dumps(body), headers={"content-type": "application/json"})
    if answer.status_code == 201:
        return
    code = answer.json()["code"]
    assert answer.status_code < 500, (body, answer.text)
    expect_problem(answer, answer.status_code, code)


@MANY
@given(body=JSON)
def test_any_json(client: TestClient, body: Any) -> None:
    post(client, body)


@MANY
@given(spec=SPECIFICATIONS)
def test_any_value_in_any_field(client: TestClient, dataset: str, spec: dict[str, Any]) -> None:
    post(client, {"spec": specification(dataset) | spec})


@MANY
@given(name=st.text(), labels=st.dictionaries(st.text(), st.text()), priority=st.integers() | st.floats())
def test_any_name_label_and_priority(
    client: TestClient, dataset: str, name: str, labels: dict[str, str], priority: float
) -> None:
    post(client, {"spec": specification(dataset), "name": name, "labels": labels, "priority": priority})


@MANY
@given(path=st.text())
def test_any_path_of_a_model(client: TestClient, dataset: str, path: str) -> None:
    post(client, {"spec": specification(dataset) | {"teacher": {"path": path}, "student": TINY_MODEL}})


@MANY
@given(body=st.binary(max_size=200) | st.text().map(str.encode))
def test_any_bytes_as_rows(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/datasets", content=body, headers={"content-type": "application/jsonl"})
    assert answer.status_code in (201, 422), answer.text


@MANY
@given(parameters=st.dictionaries(st.sampled_from(["limit", "after", "status", "label"]), st.text(), min_size=1))
def test_any_filter(client: TestClient, parameters: dict[str, str]) -> None:
    answer = client.get("/v1/jobs", params=parameters)
    assert answer.status_code in (200, 422), answer.text


@pytest.mark.parametrize("number", ["1e400", "-0", "123456789012345678901234567890", "1.0", "1e1", '"1"', "true"])
def test_any_spelling_of_a_number(client: TestClient, dataset: str, number: str) -> None:
    spec = json.dumps(specification(dataset))[:-1] + f', "seed": {number}}}'
    answer = client.post("/v1/jobs", content=f'{{"spec": {spec}}}', headers={"content-type": "application/json"})
    assert answer.status_code in (201, 400, 422), answer.text
