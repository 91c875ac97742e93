"""The list of models: what may be teacher or student, as specifications name it, and nothing from elsewhere."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.testclient import TestClient

from api.app import create_app
from domain.model_catalog import ModelCatalog
from domain.settings import Settings
from pocl.errors import ModelUnsupported
from pocl.inspect import ModelFacts, inspect_model
from tests.support.requests import AUTHORIZED, KEY, LOOPBACK, expect_problem, write_model

TOKENS = {"a": 0, "b": 1, "c": 2}


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    return [tmp_path / "one", tmp_path / "two"]


@pytest.fixture
def listed(roots: list[Path], tmp_path: Path) -> Iterator[TestClient]:
    """A service with two model roots, whose database has no schema."""
    app: FastAPI = create_app(Settings(home=tmp_path / "home", api_key=SecretStr(KEY), model_roots=tuple(roots)))
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, headers=AUTHORIZED) as client:
        yield client
    app.state.database.close()


def models(client: TestClient, **query: Any) -> dict[str, dict[str, Any]]:
    response = client.get("/v1/models", params=query)
    assert response.status_code == 200, response.text
    return {model["id"]: model for model in response.json()["data"]}


def test_a_model_is_listed_by_the_path_that_a_specification_names(listed: TestClient, roots: list[Path]) -> None:
    write_model(roots[0] / "acme" / "small", tokens=TOKENS, layers=2)
    write_model(roots[1] / "tiny", tokens=dict(reversed(TOKENS.items())))
    write_model(roots[1] / "other", tokens={**TOKENS, "d": 3})
    found = models(listed)
    assert list(found) == ["acme/small", "other", "tiny"]
    small = found["acme/small"]
    assert small["state"] == "usable"
    facts = small["facts"]
    assert (facts["family"], facts["layers"], facts["dtype"], facts["has_chat_template"]) == ("llama", 2, "F32", False)
    # Embeddings 3 x 4; in each layer four attention and three other matrices of 4 x 4 and two norms; a last norm.
    assert facts["parameters"] == 3 * 4 + 2 * (7 * 16 + 2 * 4) + 4
    assert facts["layers_selectable"] is True
    assert facts["vocabulary"]["size"] == facts["vocabulary"]["tokens"] == 3
    digests = {name: model["facts"]["vocabulary"]["sha256"] for name, model in found.items()}
    # The digest is over tokens and ids, in whatever order a file has them.
    assert digests["acme/small"] == digests["tiny"] != digests["other"]
    assert listed.get("/v1/models/acme/small").json() == small
    assert listed.get("/v1/models/acme%2Fsmall").json() == small


def test_what_cannot_be_used_says_why(listed: TestClient, roots: list[Path]) -> None:
    adapter = roots[0] / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (adapter / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (roots[0] / "notes.gguf").write_bytes(b"GGUX")
    pickled = write_model(roots[0] / "pickled", tokens=TOKENS)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    found = models(listed)
    assert {model["state"] for model in found.values()} == {"refused"}
    assert {model["refusal"]["code"] for model in found.values()} == {ModelUnsupported.code}
    assert "adapter" in found["adapter"]["refusal"]["message"]
    assert "pickled" in found["pickled"]["refusal"]["message"]
    assert not any(str(roots[0]) in json.dumps(model) for model in found.values())


def test_pages_and_changed_files(listed: TestClient, roots: list[Path]) -> None:
    for number in range(5):
        write_model(roots[number % 2] / f"model-{number}", tokens=TOKENS)
    names, after = [], None
    while True:
        page = listed.get("/v1/models", params={"limit": 2, **({} if after is None else {"after": after})}).json()
        names += [model["id"] for model in page["data"]]
        assert page["complete"] is True
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert names == [f"model-{number}" for number in range(5)]
    (roots[0] / "model-0" / "config.json").write_text("{")
    assert models(listed)["model-0"]["state"] == "refused"


def test_nothing_outside_of_the_roots_is_shown(listed: TestClient, roots: list[Path], tmp_path: Path) -> None:
    write_model(roots[0] / "inside", tokens=TOKENS)
    write_model(tmp_path / "secret", tokens=TOKENS)
    (roots[0] / "link").symlink_to(tmp_path / "secret")
    (roots[0] / "circle").symlink_to(roots[0])
    write_model(roots[0] / ".hidden", tokens=TOKENS)
    os.mkfifo(roots[0] / "inside" / "pipe")
    assert list(models(listed)) == ["inside"]
    for wrong in (
        "link",
        "%2e%2e%2Fsecret",
        "nothing",
        "inside%2F..%2Finside",
        "/etc",
        "inside/config.json",
        "inside/",
        "%00",
    ):
        response = listed.get(f"/v1/models/{wrong}")
        assert response.status_code in (404, 422), wrong
    expect_problem(listed.get("/v1/models/nothing"), 404, "model_not_found")
    expect_problem(listed.get(f"/v1/models/{tmp_path}/secret"), 404, "model_not_found")


def test_files_are_read_once_and_for_no_longer_than_allowed(tmp_path: Path) -> None:
    for name in "abc":
        write_model(tmp_path / name, tokens=TOKENS)
    now, read = 0.0, []

    def inspect(path: Path) -> ModelFacts:
        nonlocal now
        now += 6
        read.append(path.name)
        return inspect_model(path)

    catalog = ModelCatalog([tmp_path], seconds=10, inspect=inspect, clock=lambda: now)
    first = catalog.list_models(limit=10).page.rows
    assert [model.description is None for model in first] == [False, False, True]
    assert all(model.description for model in catalog.list_models(limit=10).page.rows)
    assert read == ["a", "b", "c"]


def test_a_search_that_is_cut_says_so(tmp_path: Path) -> None:
    write_model(tmp_path / "a/b/c/d/e", tokens=TOKENS)
    assert [model.path for model in ModelCatalog([tmp_path]).list_models(limit=10).page.rows] == ["a/b/c/d/e"]
    (tmp_path / "a/b/c/d/e/f").mkdir()
    listing = ModelCatalog([tmp_path, tmp_path / "missing"]).list_models(limit=10)
    assert (len(listing.page.rows), listing.complete) == (1, False)
