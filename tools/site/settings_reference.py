"""The reference of the settings, as Markdown, from their classes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from domain.environment import variable_of
from domain.secret_files import file_variable
from domain.settings import Settings
from worker.settings import WorkerSettings

_KINDS: Final[Mapping[str, type[BaseSettings]]] = {
    "Of the service": Settings,
    "Of workers and schedulers": WorkerSettings,
}
_BOUNDS: Final[Mapping[str, str]] = {
    "minimum": "at least {}", "exclusiveMinimum": "more than {}",
    "maximum": "at most {}", "exclusiveMaximum": "less than {}",
}  # fmt: skip


def render_settings() -> str:
    """A page with every variable: its default, what it may be, and what it does."""
    lines = [
        "# Settings",
        "",
        "Environment variables, read once at the start. A variable with the prefix `POCL_` that is none of these is"
        " refused, and so is a wrong value, each by one sentence. A secret may come from a file instead: the variable"
        " with `_FILE` behind its name has the file's path.",
    ]
    for title, kind in _KINDS.items():
        lines += ["", f"## {title}", "", "| variable | default | values | |", "|---|---|---|---|"]
        lines += _rows(kind)
    return "\n".join(lines) + "\n"


def _rows(kind: type[BaseSettings]) -> Iterator[str]:
    schemas = kind.model_json_schema()["properties"]
    for name, field in kind.model_fields.items():
        variable = variable_of(kind, name)
        text = " ".join((field.description or "").split())
        if SecretStr in _types(field):
            text = f"{text} From a file: `{file_variable(variable)}`.".strip()
        cells = (f"<a id='{variable}'></a>`{variable}`", _default(field), _values(schemas[name]), text)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _types(field: FieldInfo) -> tuple[Any, ...]:
    return (field.annotation, *getattr(field.annotation, "__args__", ()))


def _default(field: FieldInfo) -> str:
    """The default of a field; nothing where others decide it."""
    value = field.default
    if value is None or value in ("", (), Path()):
        return ""
    return f"`{value}`"


def _values(schema: Mapping[str, Any]) -> str:
    """What a variable may be, from its JSON schema."""
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    return " or ".join(filter(None, (_option(option) for option in options)))


def _option(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    bounds = [text.format(f"{schema[key]:g}") for key, text in _BOUNDS.items() if key in schema]
    name = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "array": "list"}.get(
        schema.get("type", ""), ""
    )
    return ", ".join(filter(None, (name, *bounds)))
