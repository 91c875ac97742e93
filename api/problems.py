"""Errors as RFC 9457 problems: every answer of 400 and above has this one shape."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import DBAPIError, TimeoutError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from domain.db import DATABASE_UNAVAILABLE
from domain.errors import (
    ApiError,
    BodyTooLarge,
    Conflict,
    Forbidden,
    IllegalTransition,
    JsonInvalid,
    NotFound,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
    Unprocessable,
    UnsupportedMediaType,
)
from pocl.errors import FieldError

MEDIA_TYPE = "application/problem+json"
_MAX_FIELD_ERRORS = 20
_MAX_POINTER_LENGTH = 256

_log = structlog.get_logger(__name__)


class FieldErrorView(BaseModel):
    """One thing wrong with the request."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    pointer: str
    """Where: an RFC 6901 pointer into the body, `/query/NAME` for a parameter, `/lines/N` for a row of a file."""
    code: str
    """Stable, for programs."""
    detail: str
    """One sentence."""


class ProblemDetails(BaseModel):
    """An error (RFC 9457). Programs decide by `code`; `detail` is for people."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str = "about:blank"
    title: str
    """The HTTP status in words."""
    status: int = Field(ge=400, le=599)
    detail: str
    """What went wrong and what to do about it."""
    instance: str
    """This occurrence."""
    code: str
    """Stable, for programs."""
    retryable: bool
    """Whether the same request may succeed later."""
    request_id: str
    """Names the request in the logs of the service; also in the header `x-request-id`."""
    errors: list[FieldErrorView] = []
    """What is wrong, piece by piece; the first 20."""
    allowed: list[str] | None = None
    """With `illegal_transition`: the states that the job may move to."""


class HttpError(ApiError):
    """An error whose answer carries headers."""

    def __init__(self, detail: str | None = None, *, headers: Mapping[str, str]) -> None:
        super().__init__(detail)
        self.headers = headers


def install(app: FastAPI) -> None:
    """Answer every error that the framework or a route raises with a problem."""
    app.add_exception_handler(ApiError, _handle_api_error)
    app.add_exception_handler(RequestValidationError, _handle_validation_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_exception_handler(DBAPIError, _handle_database_error)
    app.add_exception_handler(TimeoutError, _handle_database_error)
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)


def problem_responses(*errors: type[ApiError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation that may raise these; several of one status share an entry."""
    described: dict[int | str, dict[str, Any]] = {}
    for error in errors:
        entry = described.setdefault(error.status, {"model": ProblemDetails, "description": ""})
        sentence = f"`{error.code}`: {str(error.__doc__).strip().splitlines()[0]}"
        entry["description"] = f"{entry['description']}\n\n{sentence}".strip()
    return described


COMMON_PROBLEMS = problem_responses(Unauthenticated, Forbidden, Unprocessable, ApiError, Unavailable)
"""What any operation that needs a key may answer."""


def problem_response(request: Request, error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """The answer for an error of ours."""
    allowed = list(error.allowed) if isinstance(error, IllegalTransition) else None
    extra = dict(headers or {})
    if isinstance(error, HttpError):
        extra |= error.headers
    if isinstance(error, Unauthenticated):
        extra["WWW-Authenticate"] = "Bearer"
    if error.status in (QuotaExceeded.status, Unavailable.status):
        extra["Retry-After"] = "5"
    return _answer(
        request,
        error.status,
        code=error.code,
        detail=error.detail,
        retryable=error.retryable,
        field_errors=error.field_errors,
        allowed=allowed,
        headers=extra,
    )


def internal_error_response(request: Request) -> Response:
    """The answer for an error that nobody foresaw; it tells nothing of it."""
    return problem_response(request, ApiError("The service failed; its log has the details under this request id."))


def _handle_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return problem_response(request, error)


def _handle_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem_response(request, Unprocessable(field_errors=[_field_error(found) for found in error.errors()]))


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
        headers["Allow"] = ", ".join(_methods(request))
    # The framework's own words name nothing of the request.
    phrase = HTTPStatus(error.status_code).phrase
    return _answer(
        request,
        error.status_code,
        code=phrase.lower().replace(" ", "_"),
        detail=f"{phrase}: see the documentation of this address.",
        retryable=False,
        headers=headers,
    )


def _methods(request: Request) -> list[str]:
    """The methods that the address has; the framework names those of one of its routes alone."""
    documented_as_it_is = request.app.openapi()["paths"].get(request.url.path)
    if documented_as_it_is is not None:
        # Not `/v1/jobs/validate` as if `validate` were a job.
        return sorted(method.upper() for method in documented_as_it_is)
    address = {key: request.scope[key] for key in ("type", "path", "root_path", "headers")}
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(route.matches({**address, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


def _handle_database_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, DATABASE_UNAVAILABLE):
        raise error
    return database_unavailable_response(request, error)


def database_unavailable_response(request: Request, error: Exception) -> Response:
    """The answer where the database is away."""
    _log.warning("database_unavailable", exc_info=error)
    return problem_response(request, Unavailable("The database does not answer at present: try again later."))


def _handle_disconnect(_request: Request, _error: Exception) -> Response:
    # Nobody reads it.
    return Response(status_code=400)


def _answer(
    request: Request,
    status: int,
    *,
    code: str,
    detail: str,
    retryable: bool,
    headers: Mapping[str, str],
    field_errors: Sequence[FieldError] = (),
    allowed: list[str] | None = None,
) -> Response:
    request_id = request.state.request_id
    body = ProblemDetails(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=f"urn:pocl:request:{request_id}",
        code=code,
        retryable=retryable,
        request_id=request_id,
        errors=[_present_field_error(found) for found in field_errors[:_MAX_FIELD_ERRORS]],
        allowed=allowed,
    )
    content = body.model_dump_json(exclude_none=True)
    return Response(content, status_code=status, headers=dict(headers), media_type=MEDIA_TYPE)


def _present_field_error(found: FieldError) -> FieldErrorView:
    return FieldErrorView(pointer=found.pointer[:_MAX_POINTER_LENGTH], code=found.code, detail=found.detail)


def _field_error(error: Mapping[str, Any]) -> FieldError:
    return FieldError(
        pointer=_pointer(error["loc"]), code=error["type"], detail=error["msg"].removeprefix("Value error, ")
    )


def _pointer(location: Sequence[int | str]) -> str:
    parts = location[1:] if location[0] == "body" else location
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)
