"""The public surface of the service: frozen, valid and described."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate

from api.app import create_app
from domain.settings import Settings

FROZEN = Path(__file__).parents[2] / "docs" / "openapi.json"
WITHOUT_A_KEY = {"check_alive", "check_ready"}


@pytest.fixture
def document(tmp_path: Path) -> Iterator[dict[str, Any]]:
    app = create_app(Settings(home=tmp_path))
    yield json.loads(json.dumps(app.openapi()))
    app.state.database.close()


def operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for path in document["paths"].values() for operation in path.values()]


def test_the_surface_changes_only_on_purpose(document: dict[str, Any]) -> None:
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    assert document == frozen, (
        "Rewrite it with `python -m api openapi > docs/openapi.json`, and say so in the changelog."
    )


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    validate(document)


def test_every_operation_has_a_name_of_its_own(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for operation in operations(document)]
    assert len(names) == len(set(names)) > 20
    assert [name for name in names if not re.fullmatch("[a-z]+(_[a-z]+)+", name)] == []


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    tags = {tag["name"] for tag in document["tags"]}
    for operation in operations(document):
        name = operation["operationId"]
        assert operation["summary"], name
        assert not operation["summary"].endswith("."), name
        assert len(operation["description"].split()) > 4, name
        assert set(operation["tags"]) <= tags, name
        assert len(operation["tags"]) == 1, name
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), (name, parameter["name"])


def test_every_operation_documents_its_problems(document: dict[str, Any]) -> None:
    for operation in operations(document):
        name, responses = operation["operationId"], operation["responses"]
        problems = {int(status): response for status, response in responses.items() if status >= "400"}
        for status, response in problems.items():
            assert list(response["content"]) == ["application/problem+json"], (name, status)
            schema = response["content"]["application/problem+json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ProblemDetails"}, (name, status)
            assert re.match("`[a-z_]+`: ", response["description"]), (name, status)
        if name not in WITHOUT_A_KEY:
            assert {401, 403, 422, 500, 503} <= set(problems), name
            assert operation["security"] == [{"bearer": []}], name
        if "requestBody" in operation:
            assert {413, 415} <= set(problems), name


def test_addresses_with_an_id_document_that_it_may_be_unknown(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert ("{" in path) == ("404" in operation["responses"]), path


def test_what_is_posted_refuses_unknown_fields(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name in ("JobCreate", "DistillationSpec", "Curriculum", "Training", "Data", "JS"):
        assert schemas[name]["additionalProperties"] is False, name
