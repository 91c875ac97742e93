"""What the service can refuse, as types: a stable code, an HTTP status and one sentence for the caller.

    ApiError
    |-- JsonInvalid                 400  the body cannot be read
    |-- Unauthenticated             401  no key, or one that is not known
    |-- Forbidden                   403  the key or the origin may not do this
    |-- NotFound                    404  nothing of that id in the project
    |   |-- JobNotFound
    |   |-- DatasetNotFound
    |   `-- CheckpointNotFound
    |-- Conflict                    409  the state of things does not allow it
    |   `-- IllegalTransition                  of a job; carries the moves it may make
    |-- BodyTooLarge                413
    |-- UnsupportedMediaType        415
    |-- Unprocessable               422  understood, and wrong; carries one problem per field
    |   |-- SpecRefused
    |   |-- DatasetRefused
    |   |-- PathOutsideModelRoots
    |   |-- ModelMissing
    |   |-- ModelRefused
    |   `-- VocabulariesDiffer
    |-- QuotaExceeded               429
    `-- Unavailable                 503  try again later

    LostLease                       an attempt that lost its job; never leaves the worker

A refusal that only one feature can make stands beside that feature, as a subclass of one of these.
Nothing here knows HTTP beyond its numbers, and only the standard library is imported.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import ClassVar, Final

from pocl.errors import FieldError


class ApiError(Exception):
    """The request could not be served."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str | None = None, *, field_errors: Sequence[FieldError] = ()) -> None:
        self.detail = detail or str(self.__doc__)
        """One sentence for the caller. It names no server path and no secret."""
        self.field_errors = tuple(field_errors)
        """What is wrong with which field."""
        super().__init__(self.detail)


def with_pointer_prefix(field_errors: Sequence[FieldError], prefix: str) -> tuple[FieldError, ...]:
    """The same errors with pointers into the document that holds the input at `prefix`, an RFC 6901 pointer."""
    return tuple(replace(error, pointer=f"{prefix}{error.pointer}") for error in field_errors)


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


class Conflict(ApiError):
    """The present state does not allow this: read it again and decide anew."""

    status = 409
    code = "conflict"


class IllegalTransition(Conflict):
    """The job cannot make this move from its present state."""

    code = "illegal_transition"

    def __init__(self, detail: str, *, allowed: Collection[str]) -> None:
        super().__init__(detail)
        self.allowed = tuple(sorted(allowed))
        """The states that the job may move to."""


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


class SpecRefused(Unprocessable):
    """The specification is not valid: correct the named fields and submit again."""

    code = "spec_invalid"


class DatasetRefused(Unprocessable):
    """The data set has rows that cannot be used: correct the named lines and upload it again."""

    code = "dataset_invalid"


class PathOutsideModelRoots(Unprocessable):
    """Name a model below a directory that the service may read models from."""

    code = "path_outside_model_roots"


class ModelMissing(Unprocessable):
    """There is no model at this path: check its spelling."""

    code = "model_not_found"


class ModelRefused(Unprocessable):
    """The model cannot be used: it must be a causal language model in safetensors or GGUF."""

    code = "model_unsupported"


class VocabulariesDiffer(Unprocessable):
    """Teacher and student give different ids to the same tokens: use a student with the teacher's tokenizer."""

    code = "vocabulary_mismatch"


SPEC_ERRORS: Final = (SpecRefused, PathOutsideModelRoots, ModelMissing, ModelRefused, VocabulariesDiffer)
"""How a specification is refused."""


class QuotaExceeded(ApiError):
    """The project has as many queued jobs as it may: wait until one has started."""

    status = 429
    code = "quota_exceeded"
    retryable = True


class Unavailable(ApiError):
    """The service cannot answer at present: try again later."""

    status = 503
    code = "unavailable"
    retryable = True


class LostLease(Exception):
    """The job belongs to another attempt, or to none: stop the engine and write nothing more."""
