"""Strict JSON: no NaN or Infinity, no key twice in one object, no lone surrogate, nesting bounded."""

import json
import re
from typing import Any, Final

import orjson

from pocl.samples.row_invalid import RowInvalid

MAX_DEPTH: Final = 32
"""The deepest nesting of objects and arrays in one row."""
NO_JSON: Final = {"\0no JSON": True}
"""Stands in place of what a file holds and JSON does not have, such as a date."""
_NO_JSON_TEXT: Final = json.dumps(NO_JSON, separators=(",", ":"))
# With the closing quote optional, an unterminated string is matched once and not tried again at each of its quotes.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def parse_strict(text: str) -> Any:  # Any: whatever JSON can hold.
    """The value of a JSON text; integers are exact at any size.

    Raises:
        RowInvalid: it is not strict JSON.
    """
    # Nesting is checked before parsing, because parsers recurse.
    if _nested_too_deeply(text):
        raise RowInvalid("nested_too_deeply", f"The row is nested more than {MAX_DEPTH} deep.")
    try:
        # orjson refuses NaN, Infinity, lone surrogates and control characters, but takes the last of equal keys.
        orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RowInvalid("not_json", f"{_reason(text, error.pos)}: column {error.colno}.") from None
    try:
        return json.loads(text, object_pairs_hook=_object_without_duplicates)
    except ValueError as error:
        if isinstance(error, RowInvalid):
            raise
        # Python bounds the digits of an integer.
        raise RowInvalid("not_json", "The line holds a number of thousands of digits.") from None


def canonical(value: object, where: str) -> str:
    """The value as JSON without spaces; keys keep their order.

    Raises:
        RowInvalid: a part of it was no value of JSON, in a file of another format.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if _NO_JSON_TEXT in text:
        detail = f"{where} holds a date, a time, bytes or an infinity, which JSON does not have: write it as text."
        raise RowInvalid("wrong_type", detail)
    return text


def _reason(text: str, position: int) -> str:
    """What is not JSON, as far as it is one of the usual mistakes, and what to do about it."""
    rest = text[position:].lstrip()
    if re.match(r"\{\s*'", text):
        return "The line is a Python dictionary and not JSON; write it with json.dumps"
    if re.match(r"-?(NaN|Infinity)", rest):
        return "The line holds NaN or Infinity, which JSON does not have; write null"
    if rest.startswith("\ufeff"):
        return "A byte-order mark stands before the line, as where files were joined; remove it"
    if re.match(r"-?(\d[\d.]*[eE]\+?\d{3}|\d{309})", rest):
        return "The line holds a number beyond 1.8e308; write it as text"
    if re.search(r",\s*[}\]]", text[max(0, position - 2) : position + 2]):
        return "The line is not strict JSON, for a comma stands before a closing bracket"
    if re.search(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}", text):
        return "The line is not strict JSON; a half of a surrogate pair may stand alone in it"
    return "The line is not strict JSON"


def _nested_too_deeply(text: str) -> bool:
    # Few brackets in all cannot nest too deeply.
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise RowInvalid("duplicate_key", f"The key {duplicate[:40]!r} occurs twice in one object.")
    return value
