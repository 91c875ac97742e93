"""Resources as OpenAI's API has them."""

from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from api.chat.schemas import seconds_since_1970
from domain.checkpoints.models import Checkpoint
from domain.datasets.models import Dataset
from domain.jobs.models import Job, JobEvaluation, JobEvent
from domain.jobs.states import JobStatus

_STATUSES = {
    JobStatus.PREPARING: "validating_files",
    JobStatus.RECOVERING: "running",
    JobStatus.CANCELLING: "running",
}
_FILE_STATUSES = {"validating": "uploaded", "ready": "processed", "refused": "error"}
_EVENT_ID = "ftevent_"

Item = TypeVar("Item")


class _Resource(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class ListPage(_Resource, Generic[Item]):
    """A page of a list."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, data: Sequence[Item], ids: Sequence[str], *, has_more: bool) -> "ListPage[Item]":
        """The page with these items."""
        return cls(data=list(data), has_more=has_more, first_id=next(iter(ids), None), last_id=ids[-1] if ids else None)


class FileObject(_Resource):
    """A data set, or the weights of a checkpoint as one archive."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: str
    status_details: str | None = None


class FileDeleted(_Resource):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class JobError(_Resource):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class FineTuningJob(_Resource):
    """A job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    result_files: list[str]
    status: str
    training_file: str
    validation_file: str | None
    trained_tokens: int | None
    seed: int
    error: JobError | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    metadata: dict[str, str]
    integrations: list[dict[str, Any]]
    user_provided_suffix: str | None


class FineTuningJobEvent(_Resource):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class FineTuningJobCheckpoint(_Resource):
    """Weights of a job."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]


class Model(_Resource):
    """A model that can be asked, trained or learnt from."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


def present_dataset(row: Dataset) -> FileObject:
    """A data set as a file."""
    return FileObject(
        id=row.id,
        bytes=row.size_bytes if row.status == "ready" else 0,
        created_at=seconds_since_1970(row.created_at),
        filename=row.name,
        purpose="fine-tune",
        status=_FILE_STATUSES[row.status],
        status_details=None if row.refusal is None else str(row.refusal["message"]),
    )


def present_archive(row: Checkpoint, size_bytes: int) -> FileObject:
    """The weights of a checkpoint as a file of this size."""
    return FileObject(
        id=row.id,
        bytes=size_bytes,
        created_at=seconds_since_1970(row.created_at),
        filename=f"{row.id}.tar",
        purpose="fine-tune-results",
        status="processed",
    )


def present_job(job: Job, students: Sequence[Checkpoint]) -> FineTuningJob:
    """A job.

    Args:
        students: its checkpoints of kind `final` and `best`, newest first.
    """
    spec = job.spec
    reason = job.end_reason or {}
    final = next((each.id for each in students if each.kind == "final"), None)
    best = next((each.id for each in students if each.kind == "best"), None)
    finish = None
    if job.status is JobStatus.RUNNING and job.progress_at is not None and job.eta_seconds is not None:
        finish = seconds_since_1970(job.progress_at) + round(job.eta_seconds)
    return FineTuningJob(
        id=job.id,
        created_at=seconds_since_1970(job.created_at),
        finished_at=None if job.finished_at is None else seconds_since_1970(job.finished_at),
        estimated_finish=finish,
        model=_model_name(spec["student"]) or _model_name(spec["teacher"]) or "random",
        fine_tuned_model=final,
        organization_id=job.project,
        result_files=[each for each in dict.fromkeys((final, best)) if each is not None],
        status=_STATUSES.get(job.status, str(job.status)),
        training_file=_data_name(spec["data"]["train"]) or "",
        validation_file=_data_name(spec["data"].get("validation")),
        trained_tokens=job.tokens_seen if job.ended else None,
        seed=spec["seed"],
        error=JobError(code=reason["code"], message=reason["message"]) if job.status is JobStatus.FAILED else None,
        hyperparameters=_hyperparameters(spec),
        method=_method(spec),
        metadata=job.labels,
        integrations=[
            {"type": "wandb", "wandb": {"project": each["project"], "name": each["run_name"], "entity": each["entity"]}}
            for each in job.trackers or []
            if each["kind"] == "wandb"
        ],
        user_provided_suffix=job.name,
    )


def present_event(event: JobEvent) -> FineTuningJobEvent:
    """An event."""
    data = event.data
    has_failed = event.type == "status" and data.get("to") == JobStatus.FAILED
    return FineTuningJobEvent(
        id=f"{_EVENT_ID}{event.job_id}_{event.seq}",
        created_at=seconds_since_1970(event.at),
        level="warn" if event.type == "warning" else "error" if has_failed else "info",
        message=_sentence(event.type, data),
        type="metrics" if event.type == "evaluated" else "message",
        data={"event": event.type, **data},
    )


def event_number(job_id: str, event_id: str) -> int | None:
    """The number of the event of a job with this id; null where no event of it has such an id."""
    number = event_id.removeprefix(f"{_EVENT_ID}{job_id}_")
    is_known = number != event_id and number.isascii() and number.isdecimal() and len(number) < 10
    return int(number) if is_known else None


def present_checkpoint(row: Checkpoint, evaluations: Sequence[JobEvaluation]) -> FineTuningJobCheckpoint:
    """A checkpoint, with the scores of the stage at whose end it was saved."""
    of_stages = {each.stage: each for each in evaluations if each.subject == "stage" and each.split == "validation"}
    scores = None if row.stage is None else of_stages.get(row.stage)
    metrics: dict[str, float] = {"step": row.step}
    if scores is not None:
        metrics |= {"full_valid_loss": scores.cross_entropy, "rouge_l": scores.rouge_l}
    return FineTuningJobCheckpoint(
        id=row.id,
        created_at=seconds_since_1970(row.created_at),
        fine_tuning_job_id=row.job_id,
        fine_tuned_model_checkpoint=row.id,
        step_number=row.step,
        metrics=metrics,
    )


def present_student(row: Checkpoint) -> Model:
    """A checkpoint as a model."""
    return Model(id=row.id, created=seconds_since_1970(row.created_at), owned_by=row.project)


def _model_name(reference: dict[str, Any] | None) -> str | None:
    """A reference to a model as `model` names it; null for one without a name."""
    if reference is None:
        return None
    hub = reference.get("hub")
    if hub is not None:
        return f"hub:{hub['repo']}@{hub['revision']}"
    return reference.get("path") or reference.get("checkpoint")


def _data_name(reference: dict[str, Any] | None) -> str | None:
    if reference is None:
        return None
    hub = reference.get("hub")
    return f"hub:{hub['repo']}@{hub['revision']}" if hub is not None else reference.get("dataset")


def _hyperparameters(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "n_epochs": spec["curriculum"]["epochs_per_stage"],
        "batch_size": spec["training"]["batch_size"],
        "learning_rate_multiplier": "auto",
    }


def _method(spec: dict[str, Any]) -> dict[str, Any]:
    if spec["teacher"] is None:
        return {"type": "supervised", "supervised": {"hyperparameters": _hyperparameters(spec)}}
    return {"type": "distillation", "distillation": {name: value for name, value in spec.items() if name != "data"}}


def _sentence(kind: str, data: dict[str, Any]) -> str:
    match kind:
        case "status" if data.get("from") is None:
            return "The job was created."
        case "status":
            reason = data.get("reason") or {}
            return str(reason.get("message", f"The job is {data['to']}."))
        case "warning":
            return str(data.get("message", "There is a warning."))
        case "stage_started":
            samples, temperature = data.get("samples"), _number(data.get("temperature"))
            return f"Stage {data.get('stage', 0) + 1} begins: {samples} samples, temperature {temperature}."
        case "stage_finished":
            return f"Stage {data.get('stage', 0) + 1} is done."
        case "evaluated":
            scores = f"ROUGE-L {_number(data.get('rouge_l'))}, cross-entropy {_number(data.get('cross_entropy'))}"
            return f"Evaluated the {data.get('subject')} on the {data.get('split')} samples: {scores}."
        case "checkpoint":
            return f"Saved a checkpoint of kind {data.get('kind')}."
        case _:
            return f"{kind.replace('_', ' ').capitalize()}."


def _number(value: Any) -> str:
    """A number for people; one that was not finite is stored as null."""
    return f"{value:.3f}" if isinstance(value, int | float) else "not finite"
