"""Checks of every request to a versioned route: a query parameter that no operation reads is refused."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, get_origin

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from domain.errors import Unprocessable
from pocl.errors import FieldError
from pocl.spec import nearest_name

_MAX_QUOTED: Final = 64
_known: dict[Callable[..., Any], Mapping[str, bool]] = {}


async def refuse_unknown_parameters(request: Request) -> None:
    """
    Raises:
        Unprocessable: a query parameter has a name that the operation does not know, or stands there twice where one
            value is expected.
    """
    if not request.scope["query_string"]:
        return
    route = request.scope["route"]
    known = _known.get(route.endpoint)
    if known is None:
        known = _known[route.endpoint] = _parameters(route)
    field_errors = []
    for name in request.query_params:
        if name not in known:
            field_errors.append(FieldError(_pointer(name), "unknown", _unknown_name(name, known)))
        elif not known[name] and len(request.query_params.getlist(name)) > 1:
            field_errors.append(FieldError(_pointer(name), "ambiguous", "It is given twice; give it once."))
    if field_errors:
        raise Unprocessable(field_errors=field_errors)


def _parameters(route: APIRoute) -> Mapping[str, bool]:
    """The names of the query parameters of an operation, and whether each may be repeated."""
    fields: dict[str, bool] = {}
    for name, field in _query_fields(route.dependant):
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            models = field.annotation.model_fields.items()
            fields |= {inner.alias or name: _may_be_repeated(inner) for name, inner in models}
        else:
            fields[name] = _may_be_repeated(field)
    return fields


def _query_fields(dependant: Dependant) -> Iterator[tuple[str, FieldInfo]]:
    for parameter in dependant.query_params:
        yield parameter.alias, parameter.field_info
    for dependency in dependant.dependencies:
        yield from _query_fields(dependency)


def _may_be_repeated(field: FieldInfo) -> bool:
    return get_origin(field.annotation) in (list, set, tuple)


def _unknown_name(name: str, known: Mapping[str, bool]) -> str:
    nearest = nearest_name(name, known)
    if nearest is not None:
        hint = f"did you mean `{nearest}`?"
    elif known:
        hint = f"there are {', '.join(f'`{each}`' for each in sorted(known))}."
    else:
        hint = "it takes none."
    return f"The operation has no parameter `{name[:_MAX_QUOTED]}`; {hint}"


def _pointer(name: str) -> str:
    return "/query/" + name.replace("~", "~0").replace("/", "~1")
