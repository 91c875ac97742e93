"""What clients post about jobs: new ones, and what is to become of those that are there."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt, model_validator

from api.jobs.spec_schema import Specification
from domain.jobs.models import LABEL_KEY
from domain.jobs.states import PauseAt
from domain.jobs.submission import MAX_LABELS, MAX_PRIORITY, MAX_TEXT_LENGTH, JobOptions, Limits

_YEAR: Final = 366 * 24 * 3600

Name = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_LENGTH, pattern=r"^[^\x00-\x1f\x7f]*$")]
Labels = Annotated[
    dict[Annotated[str, Field(pattern=f"^(?:{LABEL_KEY})$")], Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]],
    Field(max_length=MAX_LABELS),
]
Priority = Annotated[StrictInt, Field(ge=0, le=MAX_PRIORITY)]


class RequestBody(BaseModel):
    """Every field is known: a typo is refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class LimitsRequest(RequestBody):
    """What a job may take; null: as much as it needs."""

    max_runtime_seconds: StrictInt | None = Field(default=None, ge=1, le=_YEAR)
    """Of all attempts together. Then it is saved, and fails as `max_runtime_exceeded`; a retry can go on from there."""
    max_wait_seconds: StrictInt | None = Field(default=None, ge=1, le=_YEAR)
    """In the queue, before the first attempt; then it fails as `max_wait_exceeded`."""
    max_attempts: StrictInt | None = Field(default=None, ge=1, le=100)
    """That may be lost or crash; null: as the service is set, which is also the most."""


class Described(RequestBody):
    """What may be said of any new job."""

    name: Name | None = None
    """What people call it: printable characters."""
    labels: Labels = {}
    """For finding it again: lists are filtered by them."""
    priority: Priority = 0
    """Higher is run first."""
    limits: LimitsRequest = LimitsRequest()

    @property
    def options(self) -> JobOptions:
        return JobOptions(self.name, self.labels, self.priority, Limits(**self.limits.model_dump()))


class JobCreate(Described):
    """A job to be queued."""

    spec: Specification


class PauseRequest(RequestBody):
    at: PauseAt = "now"
    """`now` saves and stops; `stage_end` lets the stage end, and scores it, first."""


class RetryRequest(Described):
    """How an ended job is done again, as a new one."""

    start: Literal["checkpoint", "stage", "start"] = "checkpoint"
    """`checkpoint`: from its newest training state, where there is one; `stage`: from the end of `stage`; `start`:
    from the very start."""
    stage: StrictInt | None = Field(default=None, ge=0, lt=2**31)
    """Counted from 0; for `start` of `stage`."""

    @model_validator(mode="after")
    def _stage_is_named(self) -> Self:
        if (self.start == "stage") != (self.stage is not None):
            raise ValueError("give `stage` with `start: stage`, and only then")
        return self


class BranchRequest(Described):
    """A new job that goes on from the end of a stage of another."""

    stage: StrictInt = Field(ge=0, lt=2**31)
    """The stage, counted from 0, at whose end it begins."""
    changes: dict[str, JsonValue] = Field(default={}, max_length=32)
    """Fields of the specification to change, laid over it object by object; student, data, seed, ranking and number of
    stages stay."""


class JobUpdate(RequestBody):
    """What is not named stays as it is."""

    name: Name | None = None
    labels: Labels = {}
    priority: Priority = 0

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that were named."""
        return {name: getattr(self, name) for name in self.model_fields_set}
