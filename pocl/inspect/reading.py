"""Bounded reading of untrusted JSON files."""

import json
from pathlib import Path
from typing import cast

from pydantic import JsonValue

from pocl.errors import ModelUnsupported

JsonObject = dict[str, JsonValue]

# The largest known tokenizer, of 33 MiB, has 0.5 million containers and 1.8 million values. An empty list takes three
# bytes in a file and seventy in memory: without these bounds a file within its limit could take gigabytes.
_MAX_CONTAINERS = 1_000_000
_MAX_VALUES = 3_000_000


def read_object(path: Path, *, limit: int) -> JsonObject:
    """Read the JSON object in a file of at most `limit` bytes.

    Raises:
        ModelUnsupported: too large, not a plain file, or not a JSON object in UTF-8.
    """
    return parse_object(read_bytes(path, limit=limit), path.name)


def read_optional_object(path: Path, *, limit: int) -> JsonObject:
    """As :func:`read_object`; an empty object where there is no such file."""
    return read_object(path, limit=limit) if path.is_file() else {}


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Read a file of at most `limit` bytes.

    Raises:
        ModelUnsupported: too large, or not a plain file.
    """
    # Reading a named pipe would block for ever.
    if not path.is_file():
        raise ModelUnsupported(f"The model has no file {path.name}.")
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ModelUnsupported(f"The model's {path.name} is larger than {limit >> 20} MiB.")
    return raw


def check_value_count(raw: bytes, name: str) -> None:
    """Refuse JSON that would take far more memory than its bytes.

    Raises:
        ModelUnsupported: it may hold too many values; the message calls it `name`.
    """
    if raw.count(b"[") + raw.count(b"{") > _MAX_CONTAINERS or raw.count(b",") > _MAX_VALUES:
        raise ModelUnsupported(f"The model's {name} holds more values than any model needs.")


def parse_object(raw: bytes, name: str) -> JsonObject:
    """Parse a JSON object.

    Raises:
        ModelUnsupported: `raw` is something else, or holds too many values; the message calls it `name`.
    """
    check_value_count(raw, name)
    try:
        parsed = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        # ValueError covers broken UTF-8, broken JSON and numbers of absurd length.
        raise ModelUnsupported(f"The model's {name} is not valid JSON.") from None
    if not isinstance(parsed, dict):
        raise ModelUnsupported(f"The model's {name} is not a JSON object.")
    return cast(JsonObject, parsed)


def bounded_int(value: JsonValue, *, at_most: int) -> int | None:
    """`value` if it is a whole number from 0 to `at_most`, else None; JSON's true is not 1."""
    return value if type(value) is int and 0 <= value <= at_most else None
