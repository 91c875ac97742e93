"""What the client raises: one class for each thing that a program may do something about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final


class ClientError(Exception):
    """The base of all that this package raises; the text is a sentence for people."""


class ServiceUnreachable(ClientError):
    """No response came: the connection failed, or took too long, as often as the retry policy allows."""


class ResponseInvalid(ClientError):
    """A response is not what the service sends: another program answers at this address, or a proxy changed it."""


class WaitTimedOut(ClientError):
    """The time that was given for waiting is over; the job goes on."""


class DownloadDamaged(ClientError):
    """What arrived has another SHA-256 digest than the service names, twice."""


class TargetExists(ClientError):
    """The directory of a download holds something else already."""


@dataclass(frozen=True)
class FieldProblem:
    """What is wrong with one field of a request, or one row of a file."""

    pointer: str
    """Where it is: a JSON pointer into the body, the name of a parameter, or a row."""
    code: str
    """A stable name of the fault, for programs."""
    detail: str
    """A sentence for people."""


class DatasetRefused(ClientError):
    """An uploaded file is no data set; `errors` names its first wrong rows."""

    def __init__(self, code: str, message: str, errors: Sequence[FieldProblem]) -> None:
        super().__init__(_with_fields(f"{code}: {message}", errors))
        self.code = code
        self.errors = tuple(errors)


class ExportFailed(ClientError):
    """A checkpoint could not be exported; `fault` says whether that is for you, the machine or the service."""

    def __init__(self, code: str, message: str, fault: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.fault = fault


class ApiError(ClientError):
    """The service answered with a problem (RFC 9457).

    Attributes:
        status: the status code of HTTP.
        code: a stable name of the problem, for programs, such as `job_not_found`.
        detail: a sentence for people.
        hint: what to do about it; null where the service says no more than `detail`.
        errors: the wrong fields, each with a pointer.
        allowed: what could be done instead, where an action is refused; else empty.
        retryable: whether the same request may succeed later.
        retry_after: after how many seconds, where the service says so.
        request_id: by which the operator finds the request in the log of the service.
    """

    def __init__(self, status: int, body: Mapping[str, Any], *, retry_after: float | None = None) -> None:
        self.status = status
        self.code = str(body.get("code") or f"http_{status}")
        self.detail = str(body.get("detail") or body.get("title") or f"HTTP status {status}")
        self.hint: str | None = body.get("hint")
        self.errors = field_problems(body.get("errors"))
        self.allowed = tuple(body.get("allowed") or ())
        self.retryable = bool(body.get("retryable", False))
        self.retry_after = retry_after
        self.request_id: str | None = body.get("request_id")
        hint = f" {self.hint}" if self.hint else ""
        super().__init__(_with_fields(f"{self.code}: {self.detail}{hint}", self.errors))


class RequestInvalid(ApiError):
    """400, 415, 422: the request is wrong; `errors` says where."""


class AuthenticationFailed(ApiError):
    """401: the key is missing, unknown, revoked or expired."""


class Forbidden(ApiError):
    """403: the key may not do this."""


class NotFound(ApiError):
    """404: there is no such resource in the project of the key."""


class Conflict(ApiError):
    """409: not in the present state of the resource; `allowed` says what is possible."""


class Gone(ApiError):
    """410: it was there, and has been deleted."""


class TooLarge(ApiError):
    """413: the body is larger than the service takes."""


class RateLimited(ApiError):
    """429: too many requests or jobs for now."""


class ServerFault(ApiError):
    """5xx: the service cannot answer now, or has failed."""


_CLASSES: Final[Mapping[int, type[ApiError]]] = {
    400: RequestInvalid,
    401: AuthenticationFailed,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    413: TooLarge,
    415: RequestInvalid,
    422: RequestInvalid,
    429: RateLimited,
}


def api_error(status: int, body: Mapping[str, Any], *, retry_after: float | None = None) -> ApiError:
    """The exception for a response of 400 and above."""
    kind = _CLASSES.get(status, ServerFault if status >= 500 else ApiError)
    return kind(status, body, retry_after=retry_after)


def field_problems(errors: Any) -> tuple[FieldProblem, ...]:
    """The wrong fields of a problem, as far as it names them in the usual form."""
    listed = errors if isinstance(errors, list) else []
    return tuple(
        FieldProblem(str(each.get("pointer", "")), str(each.get("code", "")), str(each.get("detail", "")))
        for each in listed
        if isinstance(each, dict)
    )


def _with_fields(sentence: str, errors: Sequence[FieldProblem]) -> str:
    return "\n  ".join([sentence, *(f"{each.pointer or '/'}: {each.detail}" for each in errors)])
