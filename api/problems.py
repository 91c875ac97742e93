"""Errors as problem details (RFC 9457): every response of 400 and above has this one shape."""

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, iter_route_contexts
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, compile_path

from api.prefix import path_below_prefix
from domain.artifacts import ArtifactStoreRefused, ArtifactStoreUnavailable
from domain.database_errors import SENTENCES, DatabaseFault, DatabaseUnavailable
from domain.errors import (
    ActionRefused,
    ApiError,
    BodyTooLarge,
    Conflict,
    EngineRefusal,
    Forbidden,
    InsufficientScope,
    JsonInvalid,
    NotFound,
    QuotaExceeded,
    StorageFull,
    Unauthenticated,
    Unavailable,
    Unprocessable,
    UnsupportedMediaType,
    describe_error,
)
from pocl.errors import FieldError, PoclError, is_disk_full
from pocl.spec import models_in, sentence

MEDIA_TYPE = "application/problem+json"
_MAX_FIELD_ERRORS = 20
_MAX_POINTER_LENGTH = 256
_PARAMETER = re.compile(r"{[^}]*}")
"""A parameter in the template of a path."""
_MAX_MESSAGE_ERRORS = 3

_log = structlog.get_logger(__name__)


class FieldErrorView(BaseModel):
    """One wrong field of the request."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    pointer: str
    """The place of the error: an RFC 6901 pointer into the body, `/query/NAME` for a parameter, `/lines/N` for a line
    of a file, `/rows/N` for a row of one without lines."""
    code: str
    """A stable name of the error, for programs."""
    detail: str
    """One sentence for people."""


class ProblemDetails(BaseModel):
    """An error as problem details (RFC 9457). Programs decide by `code`; `detail` is for people."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str = "about:blank"
    """Always `about:blank`: the kind of the error is its `code`."""
    title: str
    """The HTTP status in words."""
    status: int = Field(ge=400, le=599)
    """The HTTP status."""
    detail: str
    """What went wrong and what to do about it."""
    message: str
    """The same in one text with the first wrong fields, for clients that show nothing else of an error."""
    instance: str
    """A URI that names this occurrence of the error."""
    code: str
    """A stable name of the error, for programs."""
    retryable: bool
    """Whether the same request may succeed later."""
    request_id: str
    """The id under which the logs of the service have the request; the header `x-request-id` has it as well."""
    errors: list[FieldErrorView] = []
    """The wrong fields of the request, the first 20 of them."""
    allowed: list[str] | None = None
    """The actions that the state of the job allows, by the last part of their paths (`delete` for DELETE); given where
    it does not allow the one that was asked for."""


class HttpError(ApiError):
    """An error whose response carries headers."""

    def __init__(self, detail: str | None = None, *, headers: Mapping[str, str]) -> None:
        super().__init__(detail)
        self.headers = headers


class RateLimited(HttpError):
    """This key has sent as many requests as it may in this minute: send the next one after `Retry-After`."""

    status = 429
    code = "rate_limited"
    retryable = True


def install(app: FastAPI) -> None:
    """Answer every error that the framework or a route raises with problem details."""
    app.add_exception_handler(ApiError, _handle_api_error)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_exception_handler(DatabaseUnavailable, _handle_database_unavailable)
    app.add_exception_handler(ArtifactStoreUnavailable, _handle_store_error)
    app.add_exception_handler(ArtifactStoreRefused, _handle_store_error)
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)


def problem_responses(*errors: type[ApiError] | type[PoclError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation that may raise these, errors of the engine as :class:`EngineRefusal`. Several of
    one status share an entry.
    """
    responses: dict[int | str, dict[str, Any]] = {}
    for error in errors:
        if issubclass(error, PoclError):
            status, hint = EngineRefusal.status, f" {error.hint}"
        else:
            status, hint = error.status, ""
        response = responses.setdefault(status, {"model": ProblemDetails, "description": ""})
        sentence = f"`{error.code}`: {describe_error(error)}{hint}"
        response["description"] = f"{response['description']}\n\n{sentence}".strip()
    return responses


class DatabaseDamaged(Unavailable):
    """The database is damaged: its operator must restore it from a backup."""

    code = "database_damaged"
    retryable = False


class ArtifactStoreAway(Unavailable):
    """The artifact store does not answer: try again later."""

    code = "artifact_store_unavailable"


class ArtifactStoreRefusal(Unavailable):
    """The artifact store refuses the service: its operator must look at it."""

    code = "artifact_store_refused"
    retryable = False


STORE_ERRORS = (ArtifactStoreAway, ArtifactStoreRefusal)
"""What an operation that reads or writes stored files may raise besides."""
DATABASE_PROBLEMS = problem_responses(Unavailable, DatabaseDamaged, StorageFull)
"""The `responses` of any operation that needs the database."""
COMMON_PROBLEMS = DATABASE_PROBLEMS | problem_responses(
    Unauthenticated, Forbidden, InsufficientScope, Unprocessable, RateLimited, ApiError
)
"""The `responses` of any operation that needs a key."""
BODY_PROBLEMS = problem_responses(JsonInvalid, BodyTooLarge, UnsupportedMediaType)
"""The `responses` of any operation that takes a JSON body."""


def problem_response(request: Request, error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """The response to an error of this service."""
    content = problem_content(error, request.state.request_id)
    all_headers = {**(headers or {}), **problem_headers(error)}
    return Response(content, status_code=error.status, headers=all_headers, media_type=MEDIA_TYPE)


def problem_headers(error: ApiError) -> dict[str, str]:
    """The header fields of the response to an error, besides those that describe its body."""
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, InsufficientScope):
        # As RFC 6750, section 3.1, has it.
        headers["WWW-Authenticate"] = f'Bearer error="insufficient_scope", scope="{error.scope}"'
    if error.retryable and error.status in (QuotaExceeded.status, Unavailable.status, StorageFull.status):
        headers.setdefault("Retry-After", "5")
    return headers


def problem_content(error: ApiError, request_id: str) -> str:
    """The problem details of an error, as JSON."""
    return _render(
        error.status,
        request_id,
        code=error.code,
        detail=error.detail,
        retryable=error.retryable,
        field_errors=error.field_errors,
        allowed=list(error.allowed) if isinstance(error, ActionRefused) else None,
    )


def internal_error_response(request: Request) -> Response:
    """The response to an error that nobody foresaw; it reveals nothing of it."""
    return problem_response(request, ApiError("The service failed; its log has the details under this request id."))


def _handle_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return problem_response(request, error)


def _handle_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    models = _body_models(request)
    return problem_response(request, Unprocessable(field_errors=[field_error(each, models) for each in error.errors()]))


def _body_models(request: Request) -> list[type[BaseModel]]:
    """What the body of a request is validated as."""
    route = request.scope.get("route")
    body = route.body_field if isinstance(route, APIRoute) else None
    return [] if body is None else list(models_in(body.field_info.annotation))


_ERROR_BY_STATUS: dict[int, type[ApiError]] = {
    error.status: error
    for error in (JsonInvalid, Unauthenticated, Forbidden, NotFound, Conflict, BodyTooLarge, UnsupportedMediaType)
}


def _handle_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = _ERROR_BY_STATUS.get(error.status_code)
    if known is not None:
        return problem_response(request, known(), error.headers)
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_allowed_methods(request))
    # The phrase of the HTTP status repeats nothing of the request.
    phrase = HTTPStatus(error.status_code).phrase
    content = _render(
        error.status_code,
        request.state.request_id,
        code=phrase.lower().replace(" ", "_"),
        detail=f"{phrase}: see the documentation of this address.",
        retryable=False,
    )
    return Response(content, status_code=error.status_code, headers=headers, media_type=MEDIA_TYPE)


def _allowed_methods(request: Request) -> list[str]:
    """The methods that the path has; the framework names those of one of its routes alone.

    Of the templates that a path fits, the one with the most text of its own counts: `/v1/jobs/validate` is no job, and
    the conversations of a model are no model whose id ends like their path.
    """
    path = path_below_prefix(request.scope)
    methods: dict[int, set[str]] = {}
    for route in iter_route_contexts(request.app.routes):
        if route.include_in_schema and route.path and compile_path(route.path)[0].fullmatch(path):
            methods.setdefault(len(_PARAMETER.sub("", route.path)), set()).update(route.methods or ())
    if methods:
        closest = methods[max(methods)]
        return sorted(closest | {"HEAD"} if "GET" in closest else closest)
    target = {key: request.scope[key] for key in ("type", "path", "root_path", "headers")}
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(route.matches({**target, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


def _handle_database_unavailable(request: Request, error: Exception) -> Response:
    assert isinstance(error, DatabaseUnavailable)
    return database_unavailable_response(request, error)


def database_unavailable_response(request: Request, error: DatabaseUnavailable) -> Response:
    """The response where the database is at fault."""
    _log.warning("database_unavailable", fault=str(error.fault), exc_info=error)
    if error.fault is DatabaseFault.DAMAGED:
        return problem_response(request, DatabaseDamaged())
    if error.fault is DatabaseFault.FULL:
        return problem_response(request, StorageFull(SENTENCES[error.fault]))
    return problem_response(request, Unavailable(SENTENCES[error.fault]))


def _handle_store_error(request: Request, error: Exception) -> Response:
    _log.warning("artifact_store_failed", error=str(error))
    if is_disk_full(error):
        return problem_response(request, StorageFull())
    away = isinstance(error, ArtifactStoreUnavailable)
    return problem_response(request, ArtifactStoreAway() if away else ArtifactStoreRefusal())


def _handle_disconnect(_request: Request, _error: Exception) -> Response:
    # The client is gone: nobody reads the response.
    return Response(status_code=400)


def _render(
    status: int,
    request_id: str,
    *,
    code: str,
    detail: str,
    retryable: bool,
    field_errors: Sequence[FieldError] = (),
    allowed: list[str] | None = None,
) -> str:
    problem = ProblemDetails(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        message=_message(detail, field_errors),
        instance=f"urn:pocl:request:{request_id}",
        code=code,
        retryable=retryable,
        request_id=request_id,
        errors=[_present_field_error(each) for each in field_errors[:_MAX_FIELD_ERRORS]],
        allowed=allowed,
    )
    return problem.model_dump_json(exclude_none=True)


def _message(detail: str, field_errors: Sequence[FieldError]) -> str:
    named = [_present_field_error(each) for each in field_errors[:_MAX_MESSAGE_ERRORS]]
    sentences = "; ".join(f"{each.pointer or '/'}: {each.detail}" for each in named)
    return f"{detail} ({sentences})" if sentences else detail


def _present_field_error(error: FieldError) -> FieldErrorView:
    return FieldErrorView(pointer=error.pointer[:_MAX_POINTER_LENGTH], code=error.code, detail=error.detail)


def field_error(error: ErrorDetails, models: Sequence[type[BaseModel]]) -> FieldError:
    """A wrong field, as Pydantic names it in `ValidationError.errors()`.

    Args:
        models: what the body was validated as.
    """
    is_body = error["loc"][0] == "body"
    detail = sentence(error, models if is_body else (), error["loc"][1:])
    return FieldError(pointer=_pointer(error["loc"]), code=error["type"], detail=detail)


def _pointer(location: Sequence[int | str]) -> str:
    parts = list(location[1:] if location[0] == "body" else location)
    if parts[:1] == ["trackers"] and len(parts) > 2:
        # The kind, by which a tagged union is told apart, is no key of the client's.
        del parts[2]
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)
