"""What webhooks tell: the types of messages, and the body of each, made from an event of a job's history.

A body is that of the Standard Webhooks specification (https://www.standardwebhooks.com): `type`, `timestamp`, `data`.
"""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from domain.jobs.models import Job, JobEvent
from domain.jobs.states import Fault, JobStatus
from pocl.events import CheckpointKind


class WebhookEventType(StrEnum):
    """The types of messages about jobs."""

    QUEUED = "job.queued"
    STARTED = "job.started"
    RUNNING = "job.running"
    STAGE_COMPLETED = "job.stage.completed"
    CHECKPOINT_CREATED = "job.checkpoint.created"
    RECOVERING = "job.recovering"
    PAUSED = "job.paused"
    RESUMED = "job.resumed"
    SUCCEEDED = "job.succeeded"
    FAILED = "job.failed"
    CANCELLED = "job.cancelled"
    PUBLISHED = "job.published"
    PUBLICATION_FAILED = "job.publication.failed"


DESCRIPTIONS: Final[Mapping[WebhookEventType, str]] = {
    WebhookEventType.QUEUED: ("The job is in the queue: it was submitted, or goes back there after an attempt."),
    WebhookEventType.STARTED: ("A worker has claimed the job, and an attempt begins."),
    WebhookEventType.RUNNING: ("The attempt trains the student."),
    WebhookEventType.STAGE_COMPLETED: ("A stage of the curriculum is trained, and its state is saved."),
    WebhookEventType.CHECKPOINT_CREATED: ("A checkpoint is stored and can be downloaded."),
    WebhookEventType.RECOVERING: (
        "The attempt was lost, crashed, or failed by a fault that may pass; the job is queued again, or fails."
    ),
    WebhookEventType.PAUSED: ("The job is saved, and waits until it is resumed."),
    WebhookEventType.RESUMED: ("A paused job is in the queue again."),
    WebhookEventType.SUCCEEDED: ("The student is distilled."),
    WebhookEventType.FAILED: ("The job ended without a result."),
    WebhookEventType.CANCELLED: ("The client cancelled the job, and it has ended."),
    WebhookEventType.PUBLISHED: ("The student is in its repository on the Hugging Face Hub."),
    WebhookEventType.PUBLICATION_FAILED: ("The student could not be pushed to the Hub; the job stays a success."),
}
"""What each type of message tells, in one sentence."""

TEST_TYPE: Final = "webhook.test"
"""The type of the message that an endpoint gets on request, whatever it is subscribed to."""


class _Part(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class WebhookJob(_Part):
    """The job that a message is about."""

    id: str
    """The id of the job."""
    name: str | None
    """The name that people call the job."""
    project: str
    """The project of the job."""
    labels: dict[str, str]
    """The labels of the job when the message was written."""


class WebhookReason(_Part):
    """Why a job, or an attempt at it, ended."""

    code: str
    """A stable name of the reason, for programs."""
    message: str
    """One sentence for people."""
    fault: Fault | None
    """Whose fault it is; null for success."""
    retryable: bool
    """Whether a retry of the job may end otherwise."""
    hint: str
    """What can be done about it."""


class JobData(_Part):
    """What every message about a job says."""

    job: WebhookJob
    """The job that the message is about."""
    sequence: int
    """The number of the event in the history of the job (`GET /v1/jobs/{job_id}/events`): a message with a lower number
    tells of something earlier, in whichever order messages arrive."""


class TransitionData(JobData):
    """A job has another state."""

    previous_status: JobStatus | None
    """The state of the job before; null for a new job."""
    attempt: int | None
    """The number of the newest attempt, counted from 1; null before the first."""


class QueuedData(TransitionData):
    """A job is in the queue."""

    not_before: datetime | None
    """When the job may be claimed; null: at once."""


class ReasonData(TransitionData):
    """A job has ended, or lost an attempt."""

    reason: WebhookReason
    """Why."""


class StageData(JobData):
    """A stage is trained."""

    stage: int
    """The stage, counted from 0."""
    step: int
    """The optimiser steps of the job so far."""
    epochs: int
    """The epochs that were run; fewer than planned after convergence."""


class WebhookCheckpoint(_Part):
    """A checkpoint that is stored."""

    id: str
    """The id of the checkpoint."""
    kind: CheckpointKind
    """What the checkpoint is: a training state, the end of a stage, the best or the final student."""
    step: int
    """The optimiser steps of the job when it was saved."""
    stage: int | None
    """The stage, counted from 0; null where the checkpoint belongs to none."""
    size_bytes: int
    """The size of its files in bytes."""


class CheckpointData(JobData):
    """A checkpoint is stored."""

    checkpoint: WebhookCheckpoint
    """The checkpoint."""


class WebhookPublicationError(_Part):
    """Why the student could not be pushed."""

    code: str
    """A stable name of the reason, for programs."""
    message: str
    """One sentence for people."""


class WebhookPublication(_Part):
    """The push of a student to the Hugging Face Hub."""

    repo: str
    """The repository, as `owner/name`."""
    branch: str
    """The branch."""
    checkpoint: str | None
    """The id of the checkpoint; null where the job stored none of the kind."""
    url: str | None
    """Where people see the repository; null where the push failed."""
    commit: str | None
    """The commit of the branch that has the files; null where the push failed."""
    error: WebhookPublicationError | None
    """Why the push failed; null where it did not."""


class PublicationData(JobData):
    """The student of a job was pushed, or could not be."""

    publication: WebhookPublication
    """The push."""


class TestData(_Part):
    """A message on request."""

    webhook: str
    """The id of the endpoint."""
    message: str = "This is a test message."
    """One sentence for people."""


class WebhookMessage(_Part):
    """The body of a message."""

    # For each class that is made from this one Pydantic would search all frames of the stack for its source.
    model_config = ConfigDict(use_attribute_docstrings=False)

    type: str = Field(description="What happened.")
    timestamp: datetime = Field(description="When it happened.")
    data: JobData | TestData = Field(description="What is known about it.")


def _message_class(message_type: str, data: type[JobData] | type[TestData]) -> type[WebhookMessage]:
    words = "".join(word.capitalize() for word in message_type.split("."))
    fields: dict[str, Any] = {
        "type": (Annotated[Literal[message_type], Field(description="What happened.")], ...),
        "data": (Annotated[data, Field(description="What is known about it.")], ...),
    }
    description = f"The body of a message of the type `{message_type}`."
    return create_model(f"{words}Message", __base__=WebhookMessage, __doc__=description, **fields)


_DATA: Final[Mapping[WebhookEventType, type[JobData]]] = {
    WebhookEventType.QUEUED: QueuedData,
    WebhookEventType.STARTED: TransitionData,
    WebhookEventType.RUNNING: TransitionData,
    WebhookEventType.STAGE_COMPLETED: StageData,
    WebhookEventType.CHECKPOINT_CREATED: CheckpointData,
    WebhookEventType.RECOVERING: ReasonData,
    WebhookEventType.PAUSED: TransitionData,
    WebhookEventType.RESUMED: TransitionData,
    WebhookEventType.SUCCEEDED: ReasonData,
    WebhookEventType.FAILED: ReasonData,
    WebhookEventType.CANCELLED: ReasonData,
    WebhookEventType.PUBLISHED: PublicationData,
    WebhookEventType.PUBLICATION_FAILED: PublicationData,
}
MESSAGES: Final[Mapping[str, type[WebhookMessage]]] = {
    **{each.value: _message_class(each, data) for each, data in _DATA.items()},
    TEST_TYPE: _message_class(TEST_TYPE, TestData),
}
"""The body of each type of message."""

_TYPE_OF_STATUS: Final[Mapping[JobStatus, WebhookEventType | None]] = {
    JobStatus.QUEUED: WebhookEventType.QUEUED,
    JobStatus.PREPARING: WebhookEventType.STARTED,
    JobStatus.RUNNING: WebhookEventType.RUNNING,
    # The client itself asked for these; what comes of it is told.
    JobStatus.PAUSING: None,
    JobStatus.CANCELLING: None,
    JobStatus.PAUSED: WebhookEventType.PAUSED,
    JobStatus.RECOVERING: WebhookEventType.RECOVERING,
    JobStatus.CANCELLED: WebhookEventType.CANCELLED,
    JobStatus.SUCCEEDED: WebhookEventType.SUCCEEDED,
    JobStatus.FAILED: WebhookEventType.FAILED,
}


def type_of_event(event: JobEvent) -> WebhookEventType | None:
    """The type of the message about an event of a job's history; null for an event that webhooks do not tell."""
    match event.type:
        case "status":
            if event.data.get("from") == JobStatus.PAUSED and event.data["to"] == JobStatus.QUEUED:
                return WebhookEventType.RESUMED
            return _TYPE_OF_STATUS[JobStatus(event.data["to"])]
        case "stage_finished":
            return WebhookEventType.STAGE_COMPLETED
        case "checkpoint":
            return WebhookEventType.CHECKPOINT_CREATED
        case "published":
            return WebhookEventType.PUBLISHED
        case "publication_failed":
            return WebhookEventType.PUBLICATION_FAILED
        case _:
            return None


def write_message(message_type: WebhookEventType, event: JobEvent, job: Job) -> str:
    """The body of the message about an event, as JSON.

    Raises:
        pydantic.ValidationError: the event lacks what the message says, as one of another version may.
    """
    data: dict[str, Any] = {
        **event.data,
        "job": {"id": job.id, "name": job.name, "project": job.project, "labels": job.labels},
        "sequence": event.seq,
        "previous_status": event.data.get("from"),
        "not_before": event.data.get("not_before"),
        "attempt": event.data.get("attempt") or None,
        "checkpoint": event.data,
        "publication": {"url": None, "commit": None, "error": None, **event.data},
    }
    message = MESSAGES[message_type].model_validate({"type": message_type, "timestamp": event.at, "data": data})
    return message.model_dump_json()


def write_test_message(webhook_id: str, at: datetime) -> str:
    """The body of a test message, as JSON."""
    data = {"webhook": webhook_id}
    return MESSAGES[TEST_TYPE].model_validate({"type": TEST_TYPE, "timestamp": at, "data": data}).model_dump_json()
