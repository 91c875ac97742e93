"""`python -m tools.client_models`: write client/pocl_client/models.py, the resources of docs/openapi.json as models.

A client must go on where a newer service says more: fields that it does not know are kept, and an enumeration admits
any further text. So the models are made here, and not by a generator whose enumerations are closed.
"""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tools.formatting import format_source

ROOT: Final = Path(__file__).resolve().parents[1]
DOCUMENT: Final = ROOT / "docs" / "openapi.json"
MODELS: Final = ROOT / "client" / "pocl_client" / "models.py"

_OPAQUE: Final = {"DistillationSpec": "dict[str, Any]", "JsonValue": "Any"}
"""Schemas whose content the client hands on as it is."""
_STREAMED: Final = ("LogMessage", "MetricMessage", "ProgressMessage")
"""What event streams carry besides events of the history."""
_SCALARS: Final = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}
_FORMATS: Final = {"date-time": "datetime", "date": "date"}
_HEADER: Final = '''"""The resources of the service. Made by `python -m tools.client_models` from docs/openapi.json.

Fields that a newer service adds are in `model_extra`, and values that it adds to an enumeration are plain text.
"""

from datetime import date, datetime
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict


class Resource(BaseModel):
    """What all resources have in common: they are read, and fields that are not known here are kept."""

    # The validator of a model is built when it is first used: of the many models a program uses a few.
    model_config = ConfigDict(extra="allow", frozen=True, defer_build=True, protected_namespaces=())
'''

Schema = Mapping[str, Any]


def references(value: Any) -> Iterator[str]:
    """The names of the schemas that a part of the document refers to."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "$ref":
                yield each.rpartition("/")[2]
            else:
                yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


class ModelWriter:
    """Python for the schemas that responses of an OpenAPI document use."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._schemas: Mapping[str, Schema] = document["components"]["schemas"]
        answers = [
            content["application/json"]
            for path in document["paths"].values()
            for operation in path.values()
            for status, response in operation["responses"].items()
            for content in [response.get("content", {})]
            if status.startswith("2") and "application/json" in content
        ]
        self._used = self._reachable({*references(answers), *(name for name in _STREAMED if name in self._schemas)})

    def _reachable(self, roots: set[str]) -> list[str]:
        found: set[str] = set()
        waiting = sorted(roots)
        while waiting:
            name = waiting.pop()
            if name not in found and name not in _OPAQUE:
                found.add(name)
                waiting += references(self._schemas[name])
        return sorted(found)

    def class_name(self, schema: str) -> str:
        """`JobView` is `Job`, unless another schema has that name."""
        short = schema.removesuffix("View")
        return schema if short in self._schemas else short

    def write(self) -> str:
        """The module."""
        enumerations = [name for name in self._used if "enum" in self._schemas[name]]
        classes = self._in_order([name for name in self._used if name not in enumerations])
        parts = [_HEADER, *map(self._enumeration, enumerations), *map(self._class, classes)]
        return "\n\n".join(parts)

    def _in_order(self, names: list[str]) -> list[str]:
        """Each class after those that its fields name."""
        ordered: list[str] = []

        def place(name: str) -> None:
            if name in ordered or name not in names:
                return
            for each in sorted(set(references(self._schemas[name])) - {name}):
                place(each)
            ordered.append(name)

        for name in names:
            place(name)
        return ordered

    def _enumeration(self, name: str) -> str:
        values = ", ".join(json.dumps(value) for value in self._schemas[name]["enum"])
        return f"{self.class_name(name)}: TypeAlias = Literal[{values}] | str"

    def _class(self, name: str) -> str:
        schema = self._schemas[name]
        required = schema.get("required", [])
        lines = [f"class {self.class_name(name)}(Resource):", *_docstring(schema.get("description", name))]
        for field, value in schema["properties"].items():
            annotation = self._annotation(value)
            attribute = _attribute(field)
            # What answers always have may be left out where a program makes one.
            is_given = field in required and "default" not in value
            default = "" if is_given else f" = {value.get('default')!r}"
            if default == " = None" and "None" not in annotation:
                annotation += " | None"
            lines.append(f"    {attribute}: {annotation}{default}")
            lines += _docstring(value["description"]) if "description" in value else []
        return "\n".join(lines) + "\n"

    def _annotation(self, value: Schema) -> str:
        if "$ref" in value:
            name = value["$ref"].rpartition("/")[2]
            return _OPAQUE.get(name) or self.class_name(name)
        if "anyOf" in value:
            return " | ".join(dict.fromkeys(self._annotation(each) for each in value["anyOf"]))
        match value.get("type"):
            case "array":
                return f"list[{self._annotation(value['items'])}]"
            case "object":
                content = value.get("additionalProperties", {})
                return f"dict[str, {self._annotation(content) if isinstance(content, dict) else 'Any'}]"
            case None:
                return "Any"
            case kind:
                return _FORMATS.get(value.get("format", ""), _SCALARS[kind])


def _attribute(field: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", field):
        raise ValueError(f"the field {field!r} needs another name in Python")
    return field


def _docstring(description: str) -> list[str]:
    text = " ".join(description.split()).replace("\\", "\\\\")
    wrapped = textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)
    return textwrap.indent('"""' + "\n".join(wrapped) + '"""', "    ").splitlines()


def main() -> None:
    document = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    MODELS.write_text(format_source(ModelWriter(document).write(), MODELS), encoding="utf-8")


if __name__ == "__main__":
    main()
