"""The form of a submission: its fields follow from the JSON Schema of the request, so that none is missing."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import orjson
from pydantic import JsonValue

from api.dashboard.forms import TOKEN_FIELD, FormFields
from api.jobs.requests import JobCreate
from api.strict_json import parse
from domain.errors import JsonInvalid
from pocl.errors import FieldError

FieldKind = Literal["text", "integer", "number", "boolean", "choice", "list", "json"]
ESSENTIALS: Final = (
    "/name",
    "/spec/preset",
    "/spec/data/train/dataset",
    "/spec/data/validation/dataset",
    "/spec/teacher/path",
    "/spec/student/from_teacher/layers",
    "/spec/student/path",
    "/spec/method/name",
)
"""The fields that stand at the top of the form."""
_SECTIONS: Final = (
    ("Teacher", "/spec/teacher/"),
    ("Student", "/spec/student/"),
    ("Data", "/spec/data/"),
    ("Method", "/spec/method/"),
    ("Curriculum", "/spec/curriculum/"),
    ("Training", "/spec/training/"),
    ("Evaluation", "/spec/evaluation/"),
    ("Device, checkpoints, export", "/spec/"),
    ("Queue, limits, retention, trackers", "/"),
)
_SIMPLE: Final[Mapping[str, FieldKind]] = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "boolean",
}
_MAX_DEPTH: Final = 8


@dataclass(frozen=True)
class FormField:
    """A field of the form."""

    pointer: str
    """Where its value stands in the request (RFC 6901); also its name in the form."""
    label: str
    kind: FieldKind
    description: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None

    @property
    def element_id(self) -> str:
        """The id of its element."""
        return "field" + re.sub(r"[^a-z0-9]+", "-", self.pointer)


@dataclass(frozen=True)
class FormSection:
    """Fields that stand together."""

    title: str
    fields: Sequence[FormField]


@cache
def form_fields() -> Mapping[str, FormField]:
    """All fields by their pointers, in the order of the schema."""
    schema = JobCreate.model_json_schema()
    found: dict[str, FormField] = {}
    for field in _walk(schema, schema["$defs"], "", "", 0):
        known = found.get(field.pointer)
        # Kinds of one object share names: their choices are those of all.
        choices = tuple(dict.fromkeys((*(known.choices if known else ()), *field.choices)))
        found[field.pointer] = FormField(**{**vars(known or field), "choices": choices})
    return found


@cache
def form_sections() -> Sequence[FormSection]:
    """The fields besides :data:`ESSENTIALS`, by the part of the request that they belong to."""
    rest = [field for pointer, field in form_fields().items() if pointer not in ESSENTIALS]
    sections = []
    for title, prefix in _SECTIONS:
        own = [field for field in rest if field.pointer.startswith(prefix)]
        rest = [field for field in rest if field not in own]
        sections.append(FormSection(title, own))
    return [section for section in sections if section.fields]


def ordered_fields() -> Iterator[FormField]:
    """All fields in the order in which they stand in the form."""
    yield from (form_fields()[pointer] for pointer in ESSENTIALS)
    for section in form_sections():
        yield from section.fields


def read_document(form: FormFields) -> tuple[dict[str, JsonValue], list[FieldError]]:
    """The request that a form stands for: fields that are empty are left out, and so have their defaults.

    Returns:
        the request, and what is wrong with values that have no JSON.
    """
    document: dict[str, JsonValue] = {"spec": {}}
    errors = []
    for pointer, text in form.multi_items():
        if pointer == TOKEN_FIELD or not text.strip():
            continue
        field = form_fields().get(pointer)
        if field is None:
            errors.append(FieldError(pointer[:256], "unknown", "The form has no such field."))
            continue
        try:
            _put(document, pointer, _value(field, text))
        except JsonInvalid as error:
            errors.append(FieldError(pointer, "json_invalid", f"Write JSON here. {error.detail}"))
    return document, errors


def write_values(document: Mapping[str, Any]) -> dict[str, str]:
    """The values of the fields for a request: what :func:`read_document` reads the same request from."""
    values = {}
    for pointer, field in form_fields().items():
        value: Any = document
        for part in pointer.split("/")[1:]:
            # The name of a method stands for the method with its defaults.
            if not (isinstance(value, str) and part == "name"):
                value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            values[pointer] = _text(field, value)
    return values


def _walk(
    schema: Mapping[str, Any], defs: Mapping[str, Any], pointer: str, text: str, depth: int
) -> Iterator[FormField]:
    """The fields of a schema at a pointer.

    Args:
        text: the description of the property that has this schema.
    """
    schema = _resolved(schema, defs)
    text = text or schema.get("description", "")
    kinds = [_resolved(each, defs) for key in ("anyOf", "oneOf") for each in schema.get(key, ())]
    kinds = [each for each in kinds if each.get("type") != "null"]
    if kinds and all(each.get("properties") for each in kinds) and depth < _MAX_DEPTH:
        for kind in kinds:
            yield from _walk(kind, defs, pointer, "", depth + 1)
    elif len(kinds) == 1:
        yield from _walk(kinds[0], defs, pointer, text, depth)
    elif schema.get("properties") and depth < _MAX_DEPTH:
        for name, child in schema["properties"].items():
            yield from _walk(child, defs, f"{pointer}/{name}", child.get("description", ""), depth + 1)
    else:
        yield _field(schema, defs, pointer, text)


def _field(schema: Mapping[str, Any], defs: Mapping[str, Any], pointer: str, text: str) -> FormField:
    choices = tuple(str(each) for each in schema.get("enum", [schema["const"]] if "const" in schema else []))
    kind: FieldKind = "choice" if choices else _SIMPLE.get(schema.get("type", ""), "json")
    if schema.get("type") == "array":
        items = _resolved(schema.get("items", {}), defs)
        kind = "list" if items.get("type") in ("string", "integer", "number") or "prefixItems" in schema else "json"
    return FormField(
        pointer=pointer,
        label=_label(pointer),
        kind=kind,
        description=" ".join(text.split()),
        choices=choices,
        low=schema.get("minimum", schema.get("exclusiveMinimum")),
        high=schema.get("maximum", schema.get("exclusiveMaximum")),
    )


def _resolved(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        schema = defs[schema["$ref"].rpartition("/")[2]]
    return schema


def _label(pointer: str) -> str:
    """The last parts of a pointer, in words."""
    parts = pointer.removeprefix("/spec").strip("/").split("/")
    return ", ".join(part.replace("_", " ") for part in (parts[1:] or parts))


def _value(field: FormField, text: str) -> JsonValue:
    """The value that a text stands for. A number that cannot be read stays a text, which the request's check refuses.

    Raises:
        JsonInvalid: the field takes JSON, and the text is none.
    """
    text = text.strip() if field.kind != "text" else text
    if field.kind in ("integer", "number"):
        return _number(text)
    if field.kind == "boolean":
        return {"true": True, "false": False}.get(text, text)
    if field.kind == "list":
        return [_number(each.strip()) for each in text.strip("[]").split(",") if each.strip()]
    return parse(text.encode()) if field.kind == "json" else text


def _number(text: str) -> JsonValue:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return parse(str(float(text)).encode())
    except (ValueError, JsonInvalid):
        return text


def _text(field: FormField, value: Any) -> str:
    if field.kind == "list" and isinstance(value, list | tuple):
        return ", ".join(str(each) for each in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    return _json(value)


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _put(document: dict[str, JsonValue], pointer: str, value: JsonValue) -> None:
    *parents, name = pointer.split("/")[1:]
    place = document
    for part in parents:
        child = place.setdefault(part, {})
        assert isinstance(child, dict), "the schema has an object here"
        place = child
    place[name] = value
