"""Rows of a data set as tokens over HTTP: what a run would train on, and what it would refuse."""

import json
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from domain.encoding_checks import EncodingChecker
from domain.settings import Settings
from tests.support.encoders import unlimited_checker
from tests.support.requests import JSONL, expect_problem, pointers, specification, upload

pytestmark = pytest.mark.system


@pytest.fixture
def app(app: FastAPI) -> FastAPI:
    app.state.encoding_checker = unlimited_checker()
    return app


def upload_rows(client: TestClient, *rows: dict[str, Any]) -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows)
    response = client.post("/v1/datasets", content=content, headers=JSONL)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def preview(client: TestClient, dataset: str, **query: Any) -> dict[str, Any]:
    response = client.get(f"/v1/datasets/{dataset}/preview", params={"model": "random", **query})
    assert response.status_code == 200, response.text
    page: dict[str, Any] = response.json()
    return page


def trained_text(row: dict[str, Any]) -> str:
    """What is trained on, where each token is a byte."""
    ids = [token["id"] for token in row["tokens"] if token["trained"]]
    return "".join(chr(id_) if id_ < 256 else "<|eos|>" for id_ in ids)


def test_rows_are_shown_as_tokens_with_what_is_trained_on(client: TestClient) -> None:
    talk = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    dataset = upload_rows(client, {"instruction": "Say it", "output": "It"}, {"messages": talk})
    page = preview(client, dataset)
    assert (page["samples"], page["tried"], page["template"], page["end"]) == (2, 2, "chat", "<|eos|>")
    assert [trained_text(row) for row in page["rows"]] == ["It<|eos|>", "1<|eos|>2<|eos|>"]
    first = page["rows"][0]
    assert (first["prompt"], first["answer"]) == ("user: Say it\nassistant: ", "It<|eos|>")
    assert page["counts"]["rows"] == 2
    assert page["counts"]["tokens"] == sum(len(row["tokens"]) for row in page["rows"])


def test_page_begins_at_the_offset_and_ends_with_the_data_set(client: TestClient) -> None:
    dataset = upload(client, rows=8)
    assert [row["row"] for row in preview(client, dataset, offset=6)["rows"]] == [6, 7]
    assert [row["row"] for row in preview(client, dataset, offset=2, rows=3)["rows"]] == [2, 3, 4]
    assert preview(client, dataset, offset=100)["rows"] == []


def test_what_is_cut_is_told_of_each_row_and_of_the_data_set(client: TestClient) -> None:
    dataset = upload_rows(
        client,
        {"instruction": "x" * 100, "output": "short"},
        {"instruction": "short", "output": "y" * 100},
        {"instruction": "short", "output": "short"},
    )
    page = preview(client, dataset, max_length=64, max_prompt_length=48)
    cuts = [(row["counts"]["prompts_cut"], row["counts"]["ends_lost"]) for row in page["rows"]]
    assert cuts == [(1, 0), (0, 1), (0, 0)]
    assert (page["counts"]["prompts_cut"], page["counts"]["ends_lost"], page["counts"]["rows"]) == (1, 1, 3)
    assert [len(row["tokens"]) <= 64 for row in page["rows"]] == [True] * 3
    assert all(row["prompt"].endswith("assistant: ") for row in page["rows"])
    assert "samples_cut" in {warning["code"] for warning in page["warnings"]}


def test_row_that_a_run_would_refuse_is_shown_with_the_reason(client: TestClient) -> None:
    dataset = upload_rows(
        client, {"instruction": "fine", "output": "fine"}, {"instruction": "refuse me", "output": "fine"}
    )
    template = (
        "{% for m in messages %}{% if m.content == 'refuse me' %}{{ raise_exception('not this') }}{% endif %}"
        "{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    page = preview(client, dataset, chat_template=template)
    assert [row["refusal"] is None for row in page["rows"]] == [True, False]
    assert "not this" in page["rows"][1]["refusal"]
    assert "not this" in page["refusal"]


def test_model_of_a_path_is_read_below_the_model_roots(client: TestClient, settings: Settings) -> None:
    dataset = upload(client)
    problem = expect_problem(
        client.get(f"/v1/datasets/{dataset}/preview", params={"model": "nothing/here"}), 422, "model_not_found"
    )
    assert pointers(problem) == ["/query/model"]
    problem = expect_problem(
        client.get(f"/v1/datasets/{dataset}/preview", params={"model": "/etc"}), 422, "path_outside_model_roots"
    )
    assert pointers(problem) == ["/query/model"]
    empty = settings.model_roots[0] / "empty"
    empty.mkdir(parents=True)
    problem = expect_problem(
        client.get(f"/v1/datasets/{dataset}/preview", params={"model": "empty"}), 422, "model_unsupported"
    )
    assert pointers(problem) == ["/query/model"]
    (settings.model_roots[0] / "model.gguf").write_bytes(b"GGUF")
    expect_problem(
        client.get(f"/v1/datasets/{dataset}/preview", params={"model": "model.gguf"}), 422, "model_unsupported"
    )


@pytest.mark.parametrize(
    ("query", "status", "code", "pointer"),
    [
        ({}, 422, "invalid", "/query/model"),
        ({"model": "random:nothing"}, 422, "model_not_found", "/query/model"),
        ({"model": "ckpt_00000000"}, 404, "checkpoint_not_found", None),
        ({"model": "random", "rows": 51}, 422, "invalid", "/query/rows"),
        ({"model": "random", "offset": -1}, 422, "invalid", "/query/offset"),
        ({"model": "random", "ofset": 1}, 422, "invalid", "/query/ofset"),
        ({"model": "random", "max_length": 1}, 422, "invalid", "/query/max_length"),
        ({"model": "random", "template": "none"}, 422, "invalid", "/query/template"),
        ({"model": "random", "date": "today"}, 422, "invalid", "/query/date"),
        ({"model": "random", "date": "0"}, 422, "invalid", "/query/date"),
        ({"model": "random", "date": "2026-02-30"}, 422, "spec_invalid", "/query/date"),
        ({"model": "random", "chat_template_kwargs": "[1]"}, 422, "invalid", "/query/chat_template_kwargs"),
        ({"model": "random", "template_name": "other"}, 422, "spec_invalid", "/query/template_name"),
        ({"model": "random", "chat_template": "{% for"}, 422, "spec_invalid", None),
        ({"model": "random", "chat_template": "{% for x in range(10**12) %}{% endfor %}"}, 422, "spec_invalid", None),
    ],
)
def test_wrong_query_is_refused_naming_the_parameter(
    client: TestClient, query: dict[str, Any], status: int, code: str, pointer: str | None
) -> None:
    dataset = upload(client, rows=2)
    problem = expect_problem(client.get(f"/v1/datasets/{dataset}/preview", params=query), status, code)
    if pointer is not None:
        assert pointers(problem) == [pointer]
    else:
        assert all(each.startswith("/query/") for each in pointers(problem))


def test_data_set_of_nobody_is_not_found(client: TestClient) -> None:
    response = client.get("/v1/datasets/ds_00000000/preview", params={"model": "random"})
    expect_problem(response, 404, "dataset_not_found")


# --- The dry run ----------------------------------------------------------------------------------------


def test_dry_run_counts_what_is_cut_and_submission_accepts_it(client: TestClient) -> None:
    train = upload_rows(client, *({"instruction": "x" * 300, "output": f"{n}"} for n in range(4)))
    held_out = upload_rows(client, {"instruction": "short", "output": "short"})
    data = {"train": {"dataset": train}, "validation": {"dataset": held_out}}
    body = {"spec": specification(train, data=data)}
    plan = client.post("/v1/jobs/validate", json=body).json()
    assert [(each["part"], each["samples"], each["tried"]) for each in plan["data"]] == [
        ("train", 4, 4),
        ("validation", 1, 1),
    ]
    assert plan["data"][0]["counts"]["prompts_cut"] == 4
    assert [warning["code"] for warning in plan["warnings"]].count("samples_cut") == 1
    assert client.post("/v1/jobs", json=body).status_code == 201


def test_data_set_that_a_template_refuses_is_refused_at_the_door(client: TestClient) -> None:
    talk = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    dataset = upload_rows(client, *({"instruction": "fine", "output": "fine"} for _ in range(4)), {"messages": talk})
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    spec = specification(dataset, data={"train": {"dataset": dataset}, "chat_template": template})
    for path in ("/v1/jobs/validate", "/v1/jobs"):
        problem = expect_problem(client.post(path, json={"spec": spec}), 422, "dataset_invalid")
        assert pointers(problem) == ["/spec/data/train/dataset"]
        assert "sample 5 of " in problem["errors"][0]["detail"]
        assert "no system messages" in problem["errors"][0]["detail"]


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_service_says_how_many_samples_it_has_tried(app: FastAPI, client: TestClient, seconds: float) -> None:
    app.state.encoding_checker = EncodingChecker(seconds=seconds)
    dataset = upload(client, rows=8)
    plan = client.post("/v1/jobs/validate", json={"spec": specification(dataset)}).json()
    tried = 8 if seconds else 0
    assert plan["data"][0]["tried"] == plan["data"][0]["counts"]["rows"] == tried
    codes = {warning["code"] for warning in plan["warnings"]}
    assert ("samples_not_tried" in codes) is (tried == 0)
