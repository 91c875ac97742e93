"""What pydantic refuses, in sentences that name the nearest field or value that there is, and never repeat a value."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pocl.errors import FieldError
from pocl.spec.curriculum import CONTROL_KINDS, RANKER_KINDS
from pocl.spec.methods import KDMethod

_MAX_LISTED: Final = 12
_MAX_COMPARED: Final = 64
"""Characters of a name that are compared: the time rises with the product of the lengths."""
_QUOTED: Final = re.compile(r"'([^']*)'")
_TAGS: Final = {*KDMethod, "epochs", "convergence", *CONTROL_KINDS, *RANKER_KINDS}


def field_errors(error: ValidationError, model: type[BaseModel]) -> list[FieldError]:
    """Pydantic's errors with pointers into what the caller wrote.

    Args:
        model: what was validated.
    """
    return [
        FieldError(pointer=_pointer(details["loc"]), code=details["type"], detail=sentence(details, [model]))
        for details in error.errors(include_url=False)
    ]


def sentence(details: ErrorDetails, models: Sequence[type[BaseModel]], location: Sequence[int | str] = ()) -> str:
    """What is wrong, and what was probably meant. The value itself is not repeated.

    Args:
        models: what may have been validated.
        location: where in the model the error is; as the error says unless given.
    """
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        *parents, name = location or details["loc"]
        return f"There is no such field{_hint(str(name), _field_names(models, parents))}"
    if kind == "union_tag_invalid":
        # This is the one sentence of pydantic that quotes the value and spells enum members as Python does.
        expected = _QUOTED.findall(re.sub(r"<[\w.]+: ('\w+')>", r"\1", context["expected_tags"]))
        listed = "must be one of " + ", ".join(f"'{each}'" for each in expected)
        return f"{listed}{_meant(str(context['tag']), expected)}"
    message = details["msg"].removeprefix("Value error, ")
    if kind in ("literal_error", "enum"):
        message += _meant(str(details["input"]), _QUOTED.findall(context["expected"]))
    return message


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The name that was probably meant; None where none is near."""
    return next(iter(difflib.get_close_matches(name[:_MAX_COMPARED], known, n=1)), None)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def _hint(name: str, known: Sequence[str]) -> str:
    nearest = nearest_name(name, known)
    if nearest is not None:
        return f"; did you mean `{nearest}`?"
    return f"; there are {', '.join(f'`{each}`' for each in known)}." if 0 < len(known) <= _MAX_LISTED else "."


def _meant(value: str, expected: Sequence[str]) -> str:
    nearest = nearest_name(value, expected)
    return "" if nearest is None else f"; did you mean `{nearest}`?"


def _field_names(models: Sequence[type[BaseModel]], location: Sequence[int | str]) -> list[str]:
    """The names of the fields that the object at a location may have; of all alternatives where the tag of a union does
    not tell which it is.
    """
    for part in map(str, location):
        tagged = [model for model in models if _has_tag(model, part)]
        annotations = [field.annotation for model in models for field in _fields(model, part)]
        if len(models) > 1 and tagged:
            # The tag of a union, which the caller wrote elsewhere.
            models = tagged
        elif annotations:
            models = [model for annotation in annotations for model in models_in(annotation)]
        # All else is the place in a list or the key of a map.
    names = {field.alias or name for model in models for name, field in model.model_fields.items()}
    return sorted(names)


def _fields(model: type[BaseModel], name: str) -> list[Any]:
    return [field for own, field in model.model_fields.items() if name in (own, field.alias)]


def _has_tag(model: type[BaseModel], tag: str) -> bool:
    return any(tag in map(str, get_args(field.annotation)) for field in model.model_fields.values())


def _pointer(location: tuple[int | str, ...]) -> str:
    # A tagged union puts its tag into the location; the caller wrote no such key.
    parts = [
        str(part)
        for parent, part in zip(("", *location), location, strict=False)
        if not (part in _TAGS and parent in ("method", "advance", "control", "ranker"))
    ]
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)
