"""The literals of the code that are enumerations in the OpenAPI document, with names and descriptions there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel

from domain.datasets.models import DatasetStatus
from domain.exports.models import ExportState
from domain.jobs.forecast import ForecastBasis, WorkerFit
from domain.jobs.queue import QueueReason
from domain.jobs.states import Fault, PauseAt
from domain.keys.models import Scope
from domain.publications.models import PublicationState
from domain.trackers.models import TrackerKind, TrackerState, WandbTracker
from domain.webhooks.models import DeliveryError, DeliveryFailure, DeliveryStatus, DisabledReason, WebhookStatus
from domain.workers.models import DeviceKind, DrainMode, WakeUp, WorkerState
from pocl.chat.protocol import FinishReason
from pocl.estimate import ModelRole, PassPhase, Subject, Work
from pocl.events import ArtifactWritten, CheckpointKind, Evaluated, Phase
from pocl.spec import GgufFormat, PresetName
from pocl.spec.curriculum import ByConvergence, ColumnRanker, Curriculum
from pocl.spec.data import Data, FileFormat, ReadOptions, RowForm
from pocl.spec.models import RandomModel
from pocl.spec.training import Export, HubPush, Resources, Training

ChatRole = Literal["system", "developer", "user", "assistant"]
ModelState = Literal["usable", "refused", "not_read"]
RetryFrom = Literal["checkpoint", "stage", "start"]
TrackerFileKind = Literal["tensorboard", "wandb"]


@dataclass(frozen=True)
class Enumeration:
    """An enumeration of strings."""

    literal: Any
    """The `Literal` of its values."""
    description: str
    """One sentence for people."""

    @property
    def values(self) -> tuple[str, ...]:
        """The values in the order of the document."""
        return get_args(self.literal)


def _literal(model: type[BaseModel], field: str) -> Any:
    """The literal of a field, which has no name of its own in the code."""
    return model.model_fields[field].annotation


ENUMERATIONS: Final[Mapping[str, Enumeration]] = {
    "BadRows": Enumeration(
        _literal(ReadOptions, "on_bad_rows"),
        "What becomes of rows that are no samples: the file is refused, or they are left out and counted.",
    ),
    "ChatRole": Enumeration(ChatRole, "Who says a message."),
    "CheckpointExportState": Enumeration(ExportState, "Whether the files of an export are there."),
    "CheckpointKind": Enumeration(
        CheckpointKind,
        "What a checkpoint holds: a state to go on from, or the weights after a stage, the best one, or the last.",
    ),
    "DatasetStatus": Enumeration(
        DatasetStatus, "Whether the file of a data set has been read: only one that is ready can be trained on."
    ),
    "DecayedParameters": Enumeration(
        _literal(Training, "decayed_parameters"),
        "Which parameters weight decay acts on: matrices alone, or also biases and norms.",
    ),
    "DeliveryError": Enumeration(DeliveryError, "Why an attempt to deliver a message failed."),
    "DeliveryFailure": Enumeration(DeliveryFailure, "Why no further attempt is made at a message."),
    "DeliveryStatus": Enumeration(DeliveryStatus, "Whether a message has arrived."),
    "DeviceKind": Enumeration(DeviceKind, "The kind of a device."),
    "DeviceRequest": Enumeration(
        _literal(Resources, "device"), "The kind of the device that a job runs on; with `auto` the worker chooses."
    ),
    "DrainMode": Enumeration(
        DrainMode,
        "What becomes of the job of a worker that drains: it is finished first, or saved and put back into the queue.",
    ),
    "EasiestEnd": Enumeration(_literal(ColumnRanker, "easiest"), "Which values of a column are the easiest samples."),
    "EvaluatedModel": Enumeration(_literal(Evaluated, "subject"), "The model that was scored."),
    "ExportDtype": Enumeration(_literal(Export, "dtype"), "The format of exported weights."),
    "Fault": Enumeration(
        Fault, "Whose fault a failure is: the client's input, a limit of the machine, or the service."
    ),
    "FileFormat": Enumeration(FileFormat, "The format of a file of samples."),
    "FinishReason": Enumeration(FinishReason, "Why an answer ended: by itself, or at its limit of tokens."),
    "ForecastBasis": Enumeration(ForecastBasis, "What a forecast was computed from."),
    "Generator": Enumeration(
        _literal(Resources, "generator"), "What generates the answers that samples are ranked by."
    ),
    "GgufFormat": Enumeration(GgufFormat, "The format of matrices in a GGUF file."),
    "JobFile": Enumeration(_literal(ArtifactWritten, "kind"), "A file of a job, besides its checkpoints."),
    "KeyScope": Enumeration(Scope, "What a key may do: read, also submit and change, or also administer the project."),
    "LastBatch": Enumeration(
        _literal(Training, "last_batch"), "What becomes of the samples of an epoch that do not fill a batch."
    ),
    "ModelRole": Enumeration(ModelRole, "What a model is for in a job."),
    "ModelState": Enumeration(ModelState, "Whether a model on the machine can be used."),
    "OptimizerAtStage": Enumeration(
        _literal(Curriculum, "optimizer_at_stage"), "Whether optimiser and schedule begin anew at each stage."
    ),
    "PassPhase": Enumeration(PassPhase, "A phase that makes a pass over samples."),
    "PassSubject": Enumeration(Subject, "The model that a pass over samples scores."),
    "PauseAt": Enumeration(PauseAt, "When a job pauses: at once, or at the end of its stage."),
    "Phase": Enumeration(Phase, "What the engine is doing."),
    "Precision": Enumeration(_literal(Training, "precision"), "The format of matrix products."),
    "PresetName": Enumeration(PresetName, "The name of a preset: the defaults of all fields of a specification."),
    "PublicationState": Enumeration(PublicationState, "Whether the student is in its repository on the Hub."),
    "PushedKind": Enumeration(_literal(HubPush, "checkpoint"), "Which student is pushed to the Hub."),
    "QueueReason": Enumeration(QueueReason, "Why a queued job does not run yet."),
    "RandomFamily": Enumeration(_literal(RandomModel, "family"), "The architecture of a random model."),
    "RetryFrom": Enumeration(
        RetryFrom, "Where a retry begins: at the newest training state, at the end of a stage, or at the start."
    ),
    "RowForm": Enumeration(RowForm, "The form of the rows of a file."),
    "StageMetric": Enumeration(_literal(ByConvergence, "metric"), "The score by which stages are compared."),
    "TemplateChoice": Enumeration(
        _literal(Data, "template"),
        "How a sample becomes a text: by the chat template, by the Alpaca prompt, or by the former where there is one.",
    ),
    "TrackerFileKind": Enumeration(TrackerFileKind, "A tracker that writes a file."),
    "TrackerKind": Enumeration(TrackerKind, "A tool to which metrics are forwarded."),
    "TrackerState": Enumeration(TrackerState, "Whether a tracker still takes metrics."),
    "WakeUp": Enumeration(WakeUp, "Whether idle workers are told of new jobs at once; if not, they look for them."),
    "WandbMode": Enumeration(
        _literal(WandbTracker, "mode"), "Whether runs go to the server of Weights & Biases at once, or into files."
    ),
    "WebhookDisabledReason": Enumeration(
        DisabledReason,
        "Why a webhook gets no messages: the client disabled it, its address answered 410, or every attempt failed.",
    ),
    "WebhookStatus": Enumeration(WebhookStatus, "Whether a webhook gets messages."),
    "Work": Enumeration(Work, "Work on a device that is measured."),
    "WorkerFit": Enumeration(WorkerFit, "Whether some worker can run the job."),
    "WorkerState": Enumeration(WorkerState, "What a worker is doing."),
}
"""By the name of each."""

DESCRIPTIONS: Final[Mapping[str, str]] = {
    "JobStatus": "The state of a job; `succeeded`, `failed` and `cancelled` are its ends.",
    "StageStatus": "The state of a stage.",
    "KDMethod": "The divergence that is minimised.",
    "JsonValue": "Any JSON value.",
}
"""What schemas are that have no docstring: enumeration classes, and JSON itself."""
