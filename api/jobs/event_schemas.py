"""The messages of an event stream: the types of events, and what each of them carries."""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import Field, JsonValue, TypeAdapter

from api.jobs.publication_schemas import PublicationError
from api.jobs.schemas import Eta, PhaseView, Progress, Reason
from api.pagination import Resource
from domain.jobs.states import TERMINAL, JobStatus, PauseAt
from pocl import events as engine


class StreamEventType(StrEnum):
    """The types of messages, which their field `event` has."""

    STATE = "state"
    STAGE = "stage"
    EVALUATION = "evaluation"
    CHECKPOINT = "checkpoint"
    ARTIFACT = "artifact"
    WARNING = "warning"
    PUBLICATION = "publication"
    RUN = "run"
    PROGRESS = "progress"
    METRIC = "metric"
    LOG = "log"
    END = "end"


_Type = StreamEventType
_TYPE_BY_EVENT: Final[Mapping[str, StreamEventType]] = {
    "status": _Type.STATE,
    "pause": _Type.STATE,
    "changed": _Type.STATE,
    "stage_started": _Type.STAGE,
    "stage_finished": _Type.STAGE,
    "evaluated": _Type.EVALUATION,
    "checkpoint": _Type.CHECKPOINT,
    "artifact": _Type.ARTIFACT,
    "warning": _Type.WARNING,
    "published": _Type.PUBLICATION,
    "publication_failed": _Type.PUBLICATION,
}
LIVE_TYPES: Final = frozenset({_Type.PROGRESS, _Type.METRIC, _Type.LOG})
"""Types that are no events of the history."""
HISTORY_TYPES: Final = frozenset(_Type) - LIVE_TYPES
"""What a stream has unless types are named: the whole history."""


def stream_type_of(event: str, data: Mapping[str, Any]) -> StreamEventType:
    """The type of the message with an event of the history."""
    if event == "status" and data.get("to") in TERMINAL:
        return _Type.END
    return _TYPE_BY_EVENT.get(event, _Type.RUN)


def events_of_types(types: frozenset[StreamEventType]) -> frozenset[str] | None:
    """The types of the history's events that messages of these types may have; null for all of them."""
    if _Type.RUN in types:
        # Events that only later versions know are among them.
        return None
    # The end of a stream is always sent.
    return frozenset({"status", *(event for event, type_ in _TYPE_BY_EVENT.items() if type_ in types)})


# --- What messages carry --------------------------------------------------------------------------------


class _HistoryMessage(Resource):
    id: int
    """The number of the event in the history of the job, counted from 1."""
    at: datetime
    """When the event happened."""


class StatusData(Resource):
    """A transition of the job."""

    from_: JobStatus | None = Field(alias="from")
    """The state before it; null for a new job."""
    to: JobStatus
    """The state after it."""
    attempt: int
    """The number of the attempt; 0 before the first."""
    reason: Reason | None = None
    """Why the job ended, or why an attempt did that is followed by another; absent otherwise."""
    not_before: datetime | None = None
    """When a job that is queued again after a failure may be claimed; absent otherwise."""


class StatusMessage(_HistoryMessage):
    """The job changed its state. The message has the type `end` for the transition that ended the job, else `state`."""

    type: Literal["status"]
    """The type of the event."""
    data: StatusData
    """The transition."""


class PauseData(Resource):
    """A change of a pause that was requested before."""

    at: PauseAt
    """When the job stops."""


class PauseMessage(_HistoryMessage):
    """A job that would pause at the end of its stage is to pause now."""

    type: Literal["pause"]
    """The type of the event."""
    data: PauseData
    """The change."""


class ChangedMessage(_HistoryMessage):
    """A client changed the name, the labels or the priority of the job."""

    type: Literal["changed"]
    """The type of the event."""
    data: dict[str, JsonValue]
    """The fields that changed, with their new values."""


class RunStartedMessage(_HistoryMessage):
    """The engine has started."""

    type: Literal["run_started"]
    """The type of the event."""
    data: engine.RunStarted
    """What it is about to do."""


class PhaseMessage(_HistoryMessage):
    """The engine enters a phase."""

    type: Literal["phase"]
    """The type of the event."""
    data: engine.PhaseChanged
    """The phase."""


class DataEncodedMessage(_HistoryMessage):
    """The engine has made tokens of a data set."""

    type: Literal["data_encoded"]
    """The type of the event."""
    data: engine.DataEncoded
    """What was cut and left out."""


class StageStartedMessage(_HistoryMessage):
    """The training of a stage begins, or goes on after an interruption."""

    type: Literal["stage_started"]
    """The type of the event."""
    data: engine.StageStarted
    """The stage."""


class StageFinishedMessage(_HistoryMessage):
    """A stage is trained, and its state is saved."""

    type: Literal["stage_finished"]
    """The type of the event."""
    data: engine.StageFinished
    """The stage."""


class EvaluatedMessage(_HistoryMessage):
    """A model was scored on held-out samples."""

    type: Literal["evaluated"]
    """The type of the event."""
    data: engine.Evaluated
    """The scores."""


class CheckpointEventData(Resource):
    """A checkpoint that is in the store."""

    id: str
    """The id of the checkpoint."""
    kind: engine.CheckpointKind
    """The kind of the checkpoint."""
    step: int
    """The number of optimiser steps that were done."""
    stage: int | None
    """The stage, counted from 0; null before the first."""
    size_bytes: int
    """The size of all its files in bytes."""


class CheckpointMessage(_HistoryMessage):
    """A checkpoint can be downloaded."""

    type: Literal["checkpoint"]
    """The type of the event."""
    data: CheckpointEventData
    """The checkpoint."""


class ArtifactEventData(Resource):
    """A file of the job that is in the store."""

    kind: Literal["spec", "ranking", "answers", "result", "report"]
    """The kind of the file."""
    size_bytes: int
    """The size in bytes."""
    sha256: str
    """The SHA-256 in hexadecimal."""


class ArtifactMessage(_HistoryMessage):
    """A ranking, answers, a result or a report can be downloaded."""

    type: Literal["artifact"]
    """The type of the event."""
    data: ArtifactEventData
    """The file."""


class WarningMessage(_HistoryMessage):
    """The engine warns of something."""

    type: Literal["warning"]
    """The type of the event."""
    data: engine.Warned
    """The warning."""


class PublishedData(Resource):
    """The push of a student to the Hub."""

    repo: str
    """The repository, as `owner/name`."""
    branch: str
    """The branch."""
    checkpoint: str
    """The id of the checkpoint."""
    url: str
    """Where people see the repository."""
    commit: str
    """The commit of the branch that has the files."""


class PublishedMessage(_HistoryMessage):
    """The student is in its repository on the Hugging Face Hub."""

    type: Literal["published"]
    """The type of the event."""
    data: PublishedData
    """The push."""


class PublicationFailedData(Resource):
    """A push that is not tried again by itself."""

    repo: str
    """The repository, as `owner/name`."""
    branch: str
    """The branch."""
    checkpoint: str | None
    """The id of the checkpoint; null where the job stored none of the kind."""
    error: PublicationError
    """Why."""


class PublicationFailedMessage(_HistoryMessage):
    """The student could not be pushed to the Hugging Face Hub; the job stays a success."""

    type: Literal["publication_failed"]
    """The type of the event."""
    data: PublicationFailedData
    """The push."""


class LeaseResumedData(Resource):
    """A silence of a worker for which its attempt would have been lost."""

    attempt: int
    """The number of the attempt."""
    reason: str
    """A code for why no heartbeat came."""
    seconds: float
    """How long none came."""


class LeaseResumedMessage(_HistoryMessage):
    """The attempt goes on after a silence of its worker."""

    type: Literal["lease_resumed"]
    """The type of the event."""
    data: LeaseResumedData
    """The silence."""


class RunFinishedMessage(_HistoryMessage):
    """The engine has finished the run."""

    type: Literal["run_finished"]
    """The type of the event."""
    data: engine.RunFinished
    """How far it came."""


class RunEndedMessage(_HistoryMessage):
    """The engine was stopped, or failed."""

    type: Literal["run_ended"]
    """The type of the event."""
    data: engine.RunEnded
    """Why, and how far it came."""


class ProgressMessage(Resource):
    """How far the job is: at once when the stream begins, then at each change, once a second at most. It has no id."""

    type: Literal["progress"] = "progress"
    """The type of the message."""
    status: JobStatus
    """The state of the job."""
    phase: PhaseView | None
    """What the engine does at present; null while no worker holds the job."""
    progress: Progress
    """How far the job has come."""
    eta: Eta | None
    """The time that is left, as of a job."""


class MetricMessage(Resource):
    """The metrics of one optimiser step. Steps that an attempt runs again are not sent again."""

    type: Literal["metric"] = "metric"
    """The type of the message."""
    step: int
    """The optimiser step, counted from 1."""
    values: dict[str, float]
    """The value of each metric by its name, for instance `loss`."""


class LogMessage(Resource):
    """Consecutive lines of the engine's log."""

    type: Literal["log"] = "log"
    """The type of the message."""
    attempt: int
    """The number of the attempt, counted from 1."""
    offset: int
    """The offset of the first byte of the text in the log of the attempt. Where it is greater than `next_offset` of the
    message before, what lies between was dropped."""
    next_offset: int
    """The offset after the last byte of the text."""
    text: str
    """The text."""


StreamMessage = Annotated[
    StatusMessage
    | PauseMessage
    | ChangedMessage
    | RunStartedMessage
    | PhaseMessage
    | DataEncodedMessage
    | StageStartedMessage
    | StageFinishedMessage
    | EvaluatedMessage
    | CheckpointMessage
    | ArtifactMessage
    | WarningMessage
    | PublishedMessage
    | PublicationFailedMessage
    | LeaseResumedMessage
    | RunFinishedMessage
    | RunEndedMessage
    | ProgressMessage
    | MetricMessage
    | LogMessage,
    Field(discriminator="type"),
]
"""The content of a message, which its `type` tells; more types may be added."""


_SERVER_SENT_MESSAGE: Final = {
    "title": "ServerSentMessage",
    "type": "object",
    "description": "One message of an event stream, by the fields that server-sent events have.",
    "required": ["event", "data"],
    "properties": {
        "id": {
            "type": "string",
            "description": "What `Last-Event-ID` may be: the number of the event, and in a stream with metrics or logs "
            "more numbers after it. Messages of progress have none.",
        },
        "event": {
            "description": "The type of the message.",
            "$ref": f"#/components/schemas/{StreamEventType.__name__}",
        },
        "data": {
            "type": "string",
            "description": "The content of the message: a `StreamMessage` as JSON.",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/StreamMessage"},
        },
    },
}


def message_schemas() -> dict[str, Any]:
    """The JSON Schemas of all messages by name; `StreamMessage`, which is one of them; and `ServerSentMessage`, which
    carries it.
    """
    schema = TypeAdapter(StreamMessage).json_schema(ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = schema.pop("$defs")
    return {
        **schemas,
        "StreamMessage": {"title": "StreamMessage", "description": _DESCRIPTION, **schema},
        "ServerSentMessage": _SERVER_SENT_MESSAGE,
    }


_DESCRIPTION: Final = "The content of a message of an event stream, which its `type` tells. More types may be added."
