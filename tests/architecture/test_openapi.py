"""The public surface of the service: frozen, valid and described."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate
from pydantic import BaseModel

from api.app import create_app
from api.jobs.requests import JobCreate
from domain.keys.models import SCOPES_INCLUDED
from domain.settings import Settings
from pocl.spec import resolve

FROZEN = Path(__file__).parents[2] / "docs" / "openapi.json"
WITHOUT_A_KEY = {"check_alive", "check_ready", "get_version"}


@pytest.fixture
def document(tmp_path: Path) -> Iterator[dict[str, Any]]:
    app = create_app(Settings(home=tmp_path))
    yield json.loads(json.dumps(app.openapi()))
    app.state.database.close()


def resolved(document: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """What a part of the document is, where it is a reference."""
    for name in part.get("$ref", "#").split("/")[1:]:
        document = document[name]
    return document if "$ref" in part else part


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
            assert resolved(document, parameter).get("description", "").endswith("."), (name, parameter)


def test_every_operation_documents_its_problems(document: dict[str, Any]) -> None:
    for operation in operations(document):
        name, responses = operation["operationId"], operation["responses"]
        problems = {int(status): response for status, response in responses.items() if status >= "400"}
        for status, stated in problems.items():
            response = resolved(document, stated)
            assert list(response["content"]) == ["application/problem+json"], (name, status)
            schema = response["content"]["application/problem+json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ProblemDetails"}, (name, status)
            assert re.match("`[a-z_]+`: ", response["description"]), (name, status)
        if name not in WITHOUT_A_KEY:
            assert {401, 403, 422, 500, 503} <= set(problems), name
            assert operation["security"] in [[{"bearer": [scope]}] for scope in SCOPES_INCLUDED], name
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


def test_every_schema_and_property_is_described_in_sentences(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    undescribed = [
        f"{name}.{field}"
        for name, schema in schemas.items()
        for field, each in {"": schema, **schema.get("properties", {})}.items()
        if not each.get("description", "").strip().endswith((".", ")"))
    ]
    # These are of one field each, whose description is that of the whole.
    assert [each for each in undescribed if each not in ("IgnoredColumn.name", "ReasoningColumn.name")] == []


def parts(node: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All objects of a part of the document that are no examples, with their places."""
    if isinstance(node, dict):
        yield place, node
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key != "examples":
            yield from parts(child, f"{place}/{key}")


def test_titles_are_the_names_of_schemas(document: dict[str, Any]) -> None:
    """A generator calls a type after a title: that of a field, such as `Kind`, would be one of many."""
    for place, part in parts({name: document[name] for name in ("paths", "webhooks", "components")}, ""):
        if isinstance(part.get("title"), str):
            assert place == f"/components/schemas/{part['title']}"


def test_no_problem_response_stands_twice(document: dict[str, Any]) -> None:
    inline = [
        json.dumps(response)
        for operation in operations(document)
        for status, response in operation["responses"].items()
        if status >= "400" and "$ref" not in response
    ]
    shared = {json.dumps(response) for response in document["components"]["responses"].values()}
    assert len(set(inline)) == len(inline) < 40
    assert shared.isdisjoint(inline)
    uses = FROZEN.read_text(encoding="utf-8").count('"$ref": "#/components/responses/')
    assert uses > 10 * len(shared)


def test_the_header_fields_of_requests_and_responses_are_listed(document: dict[str, Any]) -> None:
    for operation in operations(document):
        name, responses = operation["operationId"], operation["responses"]
        parameters = {resolved(document, each)["name"] for each in operation.get("parameters", [])}
        headers = {status: set(resolved(document, each)["headers"]) for status, each in responses.items()}
        assert all("X-Request-Id" in each for each in headers.values()), name
        assert ("304" in responses) == ("If-None-Match" in parameters), name
        assert "304" not in responses or "ETag" in headers["200"] & headers["304"], name
        assert ("206" in responses) == ({"Range", "If-Range"} <= parameters), name
        assert all("Retry-After" in headers.get(status, {"Retry-After"}) for status in ("429", "503", "507")), name
        assert "WWW-Authenticate" in headers.get("401", {"WWW-Authenticate"}), name


def test_enumerations_and_objects_have_names(document: dict[str, Any]) -> None:
    for place, part in parts({name: document[name] for name in ("paths", "components")}, ""):
        is_component = re.fullmatch(r"/components/schemas/\w+", place)
        assert is_component or "enum" not in part, place
        assert is_component or not isinstance(part.get("properties"), dict), place


def test_no_default_is_sent_that_depends_on_the_preset(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    needed = {"teacher": {"path": "t"}, "student": {"path": "s"}, "data": {"train": {"path": "d"}}}
    parts = {"data": "Data", "training": "Training", "evaluation": "Evaluation", "checkpoints": "Checkpoints"}
    plain = resolve(needed).model_dump(mode="json")
    seen = set()
    for preset in ("pocl_official", "quick"):
        changed = resolve({**needed, "preset": preset}).model_dump(mode="json")
        for part, schema in {**parts, "curriculum": "Curriculum"}.items():
            for field, value in changed[part].items():
                if value != plain[part][field] and not isinstance(value, dict):
                    seen.add(field)
                    described = schemas[schema]["properties"][field]
                    assert "default" not in described, field
                    assert f"with `{preset}`" in described["description"], field
    assert {"batch_size", "max_length", "epochs_per_stage", "every_steps"} <= seen
    # What a client posts has no defaults at all, so that a generated one sends nothing of its own.
    for name in ("JobCreate", "DistillationSpec", "Curriculum", "Training", "JS", "JobRetention"):
        assert not any("default" in field for field in schemas[name]["properties"].values()), name
    assert schemas["Curriculum"]["properties"]["stages"]["description"].endswith("Unless given: `4`.")


def body_models() -> dict[str, type[BaseModel]]:
    """The models of the API by name."""
    found, pending = dict[str, type[BaseModel]](), [BaseModel]
    while pending:
        children = pending.pop().__subclasses__()
        pending += children
        found |= {child.__name__: child for child in children if child.__module__.startswith("api.")}
    return found


def test_every_json_body_has_a_valid_example(document: dict[str, Any]) -> None:
    bodies, models = [operation.get("requestBody", {}) for operation in operations(document)], body_models()
    schemas = [body["content"]["application/json"]["schema"] for body in bodies if "application/json" in str(body)]
    references = {reference for schema in schemas for reference in re.findall(r"schemas/(\w+)'", str(schema))}
    assert {"JobCreate", "KeyCreate", "ProjectCreate", "WebhookCreate"} <= references
    for name in sorted(references):
        (example,) = document["components"]["schemas"][name]["examples"]
        parsed = models[name].model_validate(example)
        if isinstance(parsed, JobCreate):
            resolve(parsed.spec)
