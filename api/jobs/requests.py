"""Request bodies of jobs: submissions, actions on a job, changes of a job."""

from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt, model_validator

from api.enumerations import RetryFrom
from api.jobs.spec_schema import PostedSpec
from api.retention.schemas import JobRetention
from domain.jobs.job_options import MAX_LABELS, MAX_PRIORITY, MAX_TEXT_LENGTH, JobOptions, Limits
from domain.jobs.models import LABEL_KEY
from domain.jobs.states import PauseAt
from domain.trackers.models import MAX_TRACKERS, TaggedTracker

_YEAR: Final = 366 * 24 * 3600

Name = Annotated[str, Field(min_length=1, max_length=MAX_TEXT_LENGTH, pattern=r"^[^\x00-\x1f\x7f]*$")]
Labels = Annotated[
    dict[Annotated[str, Field(pattern=f"^(?:{LABEL_KEY})$")], Annotated[str, Field(max_length=MAX_TEXT_LENGTH)]],
    Field(max_length=MAX_LABELS),
]
Trackers = Annotated[tuple[TaggedTracker, ...], Field(max_length=MAX_TRACKERS)]
Priority = Annotated[StrictInt, Field(ge=0, le=MAX_PRIORITY)]


class RequestBody(BaseModel):
    """A JSON body whose fields are all known: a misspelled one is refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class LimitsRequest(RequestBody):
    """The limits of a job; a null limit is none."""

    max_runtime_seconds: StrictInt | None = Field(default=None, ge=1, le=_YEAR)
    """The running time of all attempts together, in seconds. At its end the job is saved and fails as
    `max_runtime_exceeded`; a retry can resume from there."""
    max_wait_seconds: StrictInt | None = Field(default=None, ge=1, le=_YEAR)
    """The time in the queue before the first attempt, in seconds. At its end the job fails as `max_wait_exceeded`."""
    max_attempts: StrictInt | None = Field(default=None, ge=1, le=100)
    """The number of attempts that may be lost or crash before the job fails. Null takes the setting of the service,
    which is also the highest number that is accepted."""


class JobOptionsRequest(RequestBody):
    """Options of a new job besides its specification."""

    name: Name | None = None
    """The name that people call the job, in printable characters."""
    labels: Labels = {}
    """Keys and values by which lists of jobs are filtered."""
    priority: Priority = 0
    """The priority of the job in the queue; the job of the highest priority is claimed first."""
    limits: LimitsRequest = LimitsRequest()
    """The limits of the job."""
    retention: JobRetention | None = None
    """What is deleted of the job after it has ended, in place of the same fields of the project's retention policy;
    null: as that says."""
    trackers: Trackers = ()
    """Where the metrics of the job go besides the service: TensorBoard, MLflow, Weights & Biases; of each one at most.
    Their servers are those of the operator."""

    @property
    def options(self) -> JobOptions:
        limits, retention = Limits(**self.limits.model_dump()), None if self.retention is None else self.retention.given
        return JobOptions(self.name, self.labels, self.priority, limits, retention, self.trackers)

    @property
    def given_options(self) -> dict[str, Any]:
        """The options that the body names."""
        options = self.options
        return {
            name: getattr(options, name) for name in JobOptionsRequest.model_fields if name in self.model_fields_set
        }


class JobCreate(JobOptionsRequest):
    """A job to be queued."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "first",
                    "spec": {
                        "preset": "quick",
                        "teacher": {"path": "smollm2-135m-instruct"},
                        "student": {"from_teacher": {"layers": [0, 1, 28, 29]}},
                        "data": {"train": {"dataset": "ds_33ntwd1jb3fq35ykbkvw0qcdz8"}},
                        "method": "forward_kl",
                    },
                }
            ]
        }
    )

    spec: PostedSpec
    """The specification of the job. Fields that are left out have the default of the preset."""


class PauseRequest(RequestBody):
    """When a job is to be paused."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"at": "stage_end"}]})

    at: PauseAt = "now"
    """`now` saves the job and stops it; `stage_end` lets the present stage end, and evaluates it, first."""


class DescendantRequest(JobOptionsRequest):
    """Options of a job that comes from another: it keeps those of its parent that the body does not name."""

    name: Name | None = None
    """The name that people call the job, in printable characters. The parent's name is kept unless the field is
    given."""
    labels: Labels = Field(default_factory=dict)
    """Keys and values by which lists of jobs are filtered. The parent's labels are kept unless the field is given."""
    priority: Priority = Field(default_factory=lambda: 0)
    """The priority of the job in the queue; the job of the highest priority is claimed first. The parent's priority is
    kept unless the field is given."""
    retention: JobRetention | None = Field(default_factory=lambda: None)
    """What is deleted of the job after it has ended, in place of the same fields of the project's retention policy.
    That of the parent is kept unless the field is given."""
    trackers: Trackers = Field(default_factory=tuple)
    """Where the metrics of the job go besides the service. Those of the parent are kept unless the field is given, with
    runs of their own that are linked to the parent's."""


class RetryRequest(DescendantRequest):
    """How an ended job is retried, as a new job."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"start": "checkpoint"}]})

    start: RetryFrom = "checkpoint"
    """Where the new job begins: `checkpoint` is the newest training state, where there is one; `stage` is the end of
    `stage`; `start` is the very start, which for a branch is where it left its parent."""
    stage: StrictInt | None = Field(default=None, ge=0, lt=2**31)
    """The stage at whose end the new job begins, counted from 0; given with `start: stage`, and only then."""

    @model_validator(mode="after")
    def _require_stage(self) -> Self:
        if (self.start == "stage") != (self.stage is not None):
            raise ValueError("give `stage` with `start: stage`, and only then")
        return self


class BranchRequest(DescendantRequest):
    """A new job that goes on from the end of a stage of another."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"stage": 1, "changes": {"method": "js"}}]})

    stage: StrictInt = Field(ge=0, lt=2**31)
    """The stage at whose end the new job begins, counted from 0."""
    changes: dict[str, JsonValue] = Field(default={}, max_length=32)
    """The fields of the specification to change, merged into it object by object. Student, data, seed, ranking and
    number of stages cannot change."""


class JobUpdate(RequestBody):
    """Changes of a job; a field that is not named stays unchanged."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"priority": 10, "labels": {"team": "search"}}]})

    name: Name | None = None
    """The name that people call the job, in printable characters; null removes it."""
    labels: Labels = {}
    """Keys and values by which lists of jobs are filtered; they replace all labels that the job has."""
    priority: Priority = 0
    """The priority of the job in the queue; the job of the highest priority is claimed first."""
    retention: JobRetention | None = None
    """What is deleted of the job after it has ended; it replaces all that the job has of this. Null: as the project's
    retention policy says."""

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that the body names."""
        changes = {name: getattr(self, name) for name in self.model_fields_set}
        if self.retention is not None:
            changes["retention"] = self.retention.given
        return changes
