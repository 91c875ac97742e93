"""Retention policies as clients send and see them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from api.pagination import Resource
from domain.retention.models import MAX_DAYS, MAX_KEPT, RetentionPolicy

Days = Annotated[StrictInt, Field(ge=0, le=MAX_DAYS)]
Kept = Annotated[StrictInt, Field(ge=0, le=MAX_KEPT)]


class JobRetention(BaseModel):
    """What is deleted of a job after it has ended. Fields that are left out are those of the project's policy."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    checkpoint_days: Days | None = None
    """After so many days from its end the checkpoints of a job are deleted, apart from those that are pinned, that
    another job needs, and that `keep_last` and `keep_best` name; null: never."""
    keep_last: Kept = 1
    """The number of the last checkpoints that a job keeps: its final student first, then its newest training states."""
    keep_best: StrictBool = True
    """Whether a job keeps its best student."""
    history_days: Days | None = None
    """After so many days from its end the events, metrics and logs of a job are deleted, but for its changes of state;
    null: never."""
    job_days: Days | None = None
    """After so many days from its end a job is deleted with all that it made, unless a retry or branch of it is there,
    or one of its checkpoints is pinned or needed; null: never."""

    @property
    def given(self) -> dict[str, Any] | None:
        """The fields that the body names; null where it names none."""
        return {name: getattr(self, name) for name in self.model_fields_set} or None


class ProjectRetentionRequest(JobRetention):
    """The retention policy of a project. Fields that are left out have their defaults, by which nothing is deleted."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"checkpoint_days": 30, "keep_last": 2, "job_days": 365}]}
    )

    dataset_days: Days | None = None
    """A data set that no job has named for so many days is deleted; null: never."""

    @property
    def policy(self) -> RetentionPolicy:
        return RetentionPolicy(**self.model_dump())


class ProjectRetentionView(Resource):
    """The retention policy of a project."""

    object: Literal["retention_policy"] = "retention_policy"
    """The kind of the resource."""
    checkpoint_days: int | None
    """The days from the end of a job after which its checkpoints are deleted; null: never."""
    keep_last: int
    """The number of the last checkpoints that a job keeps."""
    keep_best: bool
    """Whether a job keeps its best student."""
    history_days: int | None
    """The days from the end of a job after which its events, metrics and logs are deleted; null: never."""
    job_days: int | None
    """The days from its end after which a job is deleted; null: never."""
    dataset_days: int | None
    """The days after which a data set that no job names is deleted; null: never."""


class ExpiredJobView(Resource):
    """What would be deleted of an ended job."""

    job_id: str
    """The id of the job."""
    whole: bool
    """Whether the job would be deleted with all that it made."""
    history: bool
    """Whether its events, metrics and logs would be deleted."""
    checkpoints: list[str]
    """The ids of the checkpoints that would be deleted; empty where the whole job would be."""
    size_bytes: int
    """The size of the files that would be deleted, in bytes."""


class ExpiredDatasetView(Resource):
    """A data set that would be deleted."""

    id: str
    """The id of the data set."""
    name: str
    """Its name."""
    size_bytes: int
    """Its size in bytes."""


class RetentionPreview(Resource):
    """What a policy would delete now."""

    object: Literal["retention_preview"] = "retention_preview"
    """The kind of the resource."""
    jobs: list[ExpiredJobView]
    """The jobs of which something would be deleted, oldest first."""
    datasets: list[ExpiredDatasetView]
    """The data sets that would be deleted, oldest first; with the first page alone, and 100 at most."""
    size_bytes: int
    """The size of all these files, in bytes."""
    has_more: bool
    """Whether there are ended jobs that this page has not looked at."""
    last_id: str | None
    """The last ended job that was looked at, which gets the next page as `after`; null where there was none."""
