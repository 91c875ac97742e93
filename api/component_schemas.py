"""The schemas of the OpenAPI document as generators of clients need them.

Pydantic describes what a validator does. A client that is generated of that would send the defaults of the `paper`
preset whatever preset it asks for, and give every inline enumeration a name of its own making.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from api.enumerations import DESCRIPTIONS, ENUMERATIONS
from pocl.spec import METHODS, PRESETS, DistillationSpec

Schema = dict[str, Any]


def refine(document: Schema) -> None:
    """Give enumerations their names, and leave out defaults that are not the client's to send.

    Args:
        document: the OpenAPI document, which is changed in place.
    """
    schemas: dict[str, Schema] = document["components"]["schemas"]
    _drop_preset_defaults(schemas)
    for schema in schemas.values():
        for name, field in schema.get("properties", {}).items():
            if isinstance(field.get("default"), dict):
                # The fields of the object have defaults of their own.
                del field["default"]
            if "const" in field and not field.get("description"):
                field["description"] = f"Always `{field['const']}`: it tells which of several {name}s this is."
    used: dict[str, list[str]] = {}
    _name_enumerations(document, {each.values: name for name, each in ENUMERATIONS.items()}, used)
    for name, values in used.items():
        described = {"title": name, "description": ENUMERATIONS[name].description}
        schemas.setdefault(name, {**described, "type": "string", "enum": values})
    for name, description in DESCRIPTIONS.items():
        schemas[name].setdefault("description", description)
    _name_forms(document)
    _drop_field_titles(document)
    _settle_defaults(document)
    _describe_successes(document)


def _drop_preset_defaults(schemas: dict[str, Schema]) -> None:
    """Take the defaults that depend on the preset, and say so."""
    defaults: dict[tuple[str, str], dict[str, Any]] = {}
    for preset, fields in PRESETS.items():
        for owner, name, value in _leaves(DistillationSpec, fields):
            defaults.setdefault((owner, name), {})[preset] = value
    for method in METHODS.values():
        for name, value in method.published.items():
            defaults[method.__name__, name] = {"pocl_official": value}
    for (owner, name), values in defaults.items():
        field = schemas[owner]["properties"][name]
        others = field.pop("default", None)
        described = ", ".join(f"{_spell(value)} with `{preset}`" for preset, value in values.items())
        sentence = f"The default depends on the preset: {described}, else {_spell(others)}."
        field["description"] = f"{field.get('description', '')} {sentence}".strip()


def _leaves(model: type[BaseModel], fields: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The fields that a preset sets: the name of the class that has each, its own name, and the preset's value."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            annotation = model.model_fields[name].annotation
            part = next(each for each in (annotation, *get_args(annotation)) if _is_model(each))
            yield from _leaves(part, value)
        else:
            yield model.__name__, name, value


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _spell(value: Any) -> str:
    return json.dumps(value)


def _name_enumerations(node: Any, names: Mapping[tuple[str, ...], str], used: dict[str, list[str]]) -> None:
    """Put a reference in the place of every inline enumeration that has a name."""
    for child in _children(node):
        _name_enumerations(child, names, used)
    values = node.get("enum") if isinstance(node, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return
    name = names.get(tuple(values))
    if name is not None:
        used[name] = values
        del node["enum"]
        node.pop("type", None)
        node.pop("title", None)
        node["$ref"] = f"#/components/schemas/{name}"


def _children(node: Any) -> Iterable[Any]:
    """The parts of a part of the document; an example has none, since it is no schema."""
    if isinstance(node, dict):
        return [child for name, child in node.items() if name not in ("example", "examples")]
    return node if isinstance(node, list) else ()


def _name_forms(document: Schema) -> None:
    """Make a schema with its title as the name of every form that a request may be."""
    for path in document["paths"].values():
        for operation in path.values():
            media = operation.get("requestBody", {}).get("content", {}).get("multipart/form-data")
            if media is not None:
                name = media["schema"]["title"]
                document["components"]["schemas"][name] = media["schema"]
                media["schema"] = {"$ref": f"#/components/schemas/{name}"}


def _drop_field_titles(document: Schema) -> None:
    """Leave titles to components and objects: that of a field repeats its name, and generators call types after it."""
    kept = [id(schema) for schema in document["components"]["schemas"].values()]

    def drop(node: Any) -> None:
        for name, child in (
            node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        ):
            if name == "examples":
                continue
            if isinstance(child, dict) and isinstance(child.get("title"), str) and id(child) not in kept:
                del child["title"]
            drop(child)

    drop({part: document[part] for part in ("paths", "webhooks", "components")})


def _settle_defaults(document: Schema) -> None:
    """Say of the fields of requests in words what they are unless given, and of those of answers that they are there.

    A generated client would send a default as its own, and some generators require fields that have one. Of answers a
    null may be left out; and what messages of earlier versions share may lack a field.
    """
    schemas = document["components"]["schemas"]
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    sent = _reachable([operation.get("requestBody") for operation in operations], schemas)
    told = _reachable(schemas.get("StreamMessage"), schemas)
    answered = _reachable([operation["responses"] for operation in operations], schemas)
    for name in sorted(sent | answered):
        fields = schemas[name].get("properties", {})
        required = set(schemas[name].get("required", ()))
        if name in sent:
            # The tag of a union must be there.
            required |= {each for each, field in fields.items() if "const" in field and "default" in field}
            for field in fields.values():
                _say_default(field)
        elif name not in told:
            required |= {each for each, field in fields.items() if field.get("default") is not None}
        if required:
            schemas[name]["required"] = [each for each in fields if each in required]


def _say_default(field: Schema) -> None:
    if "default" not in field:
        return
    default = field.pop("default")
    if default not in (None, [], {}) and "const" not in field:
        field["description"] = f"{field.get('description', '')} Unless given: `{_spell(default)}`.".strip()


def _reachable(roots: Any, schemas: Mapping[str, Schema]) -> set[str]:
    """The names of the schemas that these parts of the document refer to, directly or not."""
    found, pending = set[str](), [roots]
    while pending:
        for reference in re.findall(r"#/components/schemas/(\w+)", json.dumps(pending.pop())):
            if reference not in found:
                found.add(reference)
                pending.append(schemas[reference])
    return found


def _describe_successes(document: Schema) -> None:
    """Say what a response is, where the framework says that it is a success."""
    schemas = document["components"]["schemas"]
    for path in document["paths"].values():
        for operation in path.values():
            for response in operation["responses"].values():
                if response["description"] == "Successful Response":
                    (name, *_) = re.findall(r"#/components/schemas/(\w+)", json.dumps(response)) or [None]
                    response["description"] = _first_sentence(schemas[name]) if name else "It is done."


def _first_sentence(schema: Schema) -> str:
    return re.sub(r"\s+", " ", re.split(r"(?<=\.)\s", schema["description"], maxsplit=1)[0])
