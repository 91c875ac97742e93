"""Values of a row as text, or why they are none."""

from collections.abc import Collection, Mapping
from typing import Any, Final

from pocl.samples.row_invalid import RowInvalid
from pocl.samples.strict_json import parse_strict

_TEXT_PARTS: Final = ("text", "input_text", "output_text")
"""Types of the parts of a content that are text; the APIs of the field use all three."""

Fields = Mapping[str, Any]  # Any: a row may hold whatever JSON can.


def is_blank(value: object) -> bool:
    """Whether a value holds nothing: null, blank text, an empty list."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def text_of(value: object, where: str) -> str:
    """Text as it is, and an integer as its digits.

    Raises:
        RowInvalid: it is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RowInvalid("wrong_type", f"{where} is not a string.")


def filled_text(value: object, where: str) -> str:
    """As :func:`text_of`, but blank text is refused too."""
    text = text_of(value, where)
    if not text.strip():
        raise RowInvalid("empty", f"{where} is empty.")
    return text


def optional_text(value: object, where: str) -> str | None:
    """As :func:`text_of`; null and empty text are None."""
    return None if value is None else text_of(value, where) or None


def content_text(value: object, where: str, ignored: list[str], *, pattern: str) -> tuple[str, str]:
    """The text of a message's content, and the thoughts that stand in it: text as it is, or the parts of a list.

    Args:
        ignored: is given the names of fields that are not used.
        pattern: how the content is named in `ignored`.

    Raises:
        RowInvalid: it is no text, or has a part that is none.
    """
    if not isinstance(value, list):
        return text_of(value, where), ""
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise RowInvalid("wrong_type", f"{place} is not an object with type and text.")
        kind = part.get("type")
        if kind in _TEXT_PARTS:
            texts.append(text_of(part.get("text"), f"{place}.text"))
            used = "text"
        elif kind == "thinking":
            thoughts.append(text_of(part.get("thinking"), f"{place}.thinking"))
            used = "thinking"
        else:
            named = f"of type {kind[:40]!r}" if isinstance(kind, str) else "without a type"
            raise RowInvalid("not_text", f"{place} is {named}: only parts of type text are trained on; remove it.")
        ignored += other_fields(part, {"type", used}, f"{pattern}[].")
    return "".join(texts), "".join(thoughts)


def list_of(value: object, where: str) -> list[Any]:  # Any: elements are checked by the caller.
    """A list, or the text of a JSON array, as formats without lists have it.

    Raises:
        RowInvalid: it is neither.
    """
    value = parsed_text(value, where)
    if not isinstance(value, list):
        raise RowInvalid("wrong_type", f"{where} is not a list.")
    return value


def parsed_text(value: object, where: str) -> Any:
    """The value of a JSON text; what is no text as it is.

    Raises:
        RowInvalid: it is text and no strict JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_strict(value)
    except RowInvalid as error:
        raise RowInvalid("wrong_type", f"{where} is text that is not JSON.") from error


def other_fields(fields: Fields, used: Collection[str], prefix: str = "") -> list[str]:
    """The names of the fields that hold something and are not used."""
    return [f"{prefix}{name}" for name, value in fields.items() if name not in used and value is not None]
