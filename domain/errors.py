"""Errors of the service, as types: a stable code, an HTTP status and one sentence for the caller.

    ApiError
    |-- JsonInvalid                 400  the body cannot be read
    |-- Unauthenticated             401  no key, or one that is not known
    |-- Forbidden                   403  the key or the origin may not do this
    |   `-- InsufficientScope            names the scope that the key lacks
    |-- NotFound                    404  the project has nothing of that id
    |   |-- JobNotFound
    |   |-- DatasetNotFound
    |   `-- CheckpointNotFound
    |       `-- CheckpointExpired   410  there was one, and it was deleted
    |-- Conflict                    409  the present state does not allow it
    |   `-- ActionRefused                carries the actions that the job's state allows
    |       `-- IllegalTransition
    |-- BodyTooLarge                413
    |-- UnsupportedMediaType        415
    |-- Unprocessable               422  understood, and wrong; carries an error for each wrong field
    |   |-- EngineRefusal                the engine's errors about specifications, data sets and models
    |   `-- PathOutsideModelRoots
    |-- QuotaExceeded               429
    |-- Unavailable                 503  try again later
    `-- StorageFull                 507  no disk space

    LostLease                       an attempt that no longer holds its job; it never leaves the worker

An error that only one feature raises stands beside that feature, as a subclass of one of these. Nothing here knows HTTP
beyond its status codes.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar, Final

from pocl.errors import FieldError, ModelNotFound, ModelUnsupported, PoclError, SpecInvalid, VocabularyMismatch


class ApiError(Exception):
    """The request could not be served."""

    status: ClassVar[int] = 500
    code: str = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str | None = None, *, field_errors: Sequence[FieldError] = ()) -> None:
        self.detail = detail or describe_error(type(self))
        """One sentence for the caller. It names no server path and no secret."""
        self.field_errors = tuple(field_errors)
        """What is wrong with which field of the request."""
        super().__init__(self.detail)


def describe_error(error: type[Exception]) -> str:
    """What an error says where nothing more is known: the first paragraph of its docstring, as one line."""
    return " ".join(str(error.__doc__).strip().partition("\n\n")[0].split())


class JsonInvalid(ApiError):
    """The body could not be read: send well-formed JSON."""

    status = 400
    code = "json_invalid"


class Unauthenticated(ApiError):
    """Send a valid key as `Authorization: Bearer <key>`."""

    status = 401
    code = "unauthenticated"


class Forbidden(ApiError):
    """This is not allowed with the key or from the origin of the request."""

    status = 403
    code = "forbidden"


class InsufficientScope(Forbidden):
    """The key lacks the scope that this needs: use one that has it."""

    code = "insufficient_scope"

    def __init__(self, scope: str) -> None:
        super().__init__(f"This needs a key with the scope `{scope}`, which this one lacks.")
        self.scope = scope


class NotFound(ApiError):
    """There is nothing at this address."""

    status = 404
    code = "not_found"


class JobNotFound(NotFound):
    """The project has no job of this id."""

    code = "job_not_found"


class DatasetNotFound(NotFound):
    """The project has no data set of this id."""

    code = "dataset_not_found"


class CheckpointNotFound(NotFound):
    """The project has no checkpoint of this id."""

    code = "checkpoint_not_found"


class CheckpointExpired(CheckpointNotFound):
    """The checkpoint was deleted."""

    status = 410
    code = "checkpoint_expired"


class Conflict(ApiError):
    """The present state does not allow this: read it again and decide anew."""

    status = 409
    code = "conflict"


class ActionRefused(Conflict):
    """The state of the job does not allow this action."""

    code = "action_refused"

    def __init__(self, detail: str | None = None, *, allowed: Collection[str]) -> None:
        super().__init__(detail)
        self.allowed = tuple(sorted(allowed))
        """The actions that the state of the job allows."""


class IllegalTransition(ActionRefused):
    """The state of the job does not allow this transition."""

    code = "illegal_transition"


class BodyTooLarge(ApiError):
    """The body is larger than the service accepts: send a smaller one."""

    status = 413
    code = "body_too_large"


class UnsupportedMediaType(ApiError):
    """Send the body in a media type that this address accepts."""

    status = 415
    code = "unsupported_media_type"


class Unprocessable(ApiError):
    """The request is well-formed, and its content is wrong: correct the named fields."""

    status = 422
    code = "invalid"


class EngineRefusal(Unprocessable):
    """The engine refuses the request: it says why under its own code.

    Args:
        pointer: where the input of the engine stands in the request, an RFC 6901 pointer. It is put before the pointers
            of the engine's field errors; where the engine names no field, the error is about the one at the pointer.
    """

    def __init__(self, error: PoclError, *, pointer: str = "") -> None:
        field_errors = [replace(each, pointer=f"{pointer}{each.pointer}") for each in error.field_errors]
        if pointer and not field_errors:
            field_errors = [FieldError(pointer, error.code, error.message)]
        super().__init__(error.summary, field_errors=field_errors)
        self.code = error.code


@contextmanager
def engine_refusals(pointer: str = "") -> Iterator[None]:
    """Raise the engine's errors about its input, inside the block, as :class:`EngineRefusal` with this pointer.

    Errors that are not the caller's fault pass unchanged.
    """
    try:
        yield
    except PoclError as error:
        if error.fault != "user":
            raise
        raise EngineRefusal(error, pointer=pointer) from error


class PathOutsideModelRoots(Unprocessable):
    """Name a model below a directory that the service may read models from."""

    code = "path_outside_model_roots"


SPEC_ERRORS: Final = (SpecInvalid, PathOutsideModelRoots, ModelNotFound, ModelUnsupported, VocabularyMismatch)
"""The errors of a specification; those of the engine are raised as :class:`EngineRefusal`."""


class QuotaExceeded(ApiError):
    """The project has as much of this as its quota allows: queued jobs, exports, uploads, or bytes of its files."""

    status = 429
    code = "quota_exceeded"
    retryable = True


class Unavailable(ApiError):
    """The service cannot answer at present: try again later."""

    status = 503
    code = "unavailable"
    retryable = True


class StorageFull(ApiError):
    """The service has no space left to store this: free some and send it again."""

    status = 507
    code = "storage_full"
    retryable = True


class LostLease(Exception):
    """The job belongs to another attempt, or to none: stop the engine and write nothing more."""
