"""The body of `fine_tuning.jobs.create`, and the specification that it stands for.

`model` is the student. What distils it stands in `method.distillation`, or in `distillation` beside `model` (which
`extra_body` of the package sends): a specification as `POST /v1/jobs` takes it, without what the body says elsewhere.
Without either the student is trained on the answers of the file alone, by the method `sft`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from api.jobs.requests import RequestBody
from domain.errors import Unprocessable
from domain.jobs.job_options import JobOptions
from domain.trackers.models import WandbTracker
from pocl.errors import FieldError
from pocl.spec import field_errors

_CHECKPOINT: Final = re.compile(r"ckpt_[0-9a-z]{8,40}")
_HUB: Final = "hub:"
_ELSEWHERE: Final = {
    "train": "name the samples as training_file",
    "validation": "name the samples as validation_file",
}

ModelName = Annotated[str, Field(min_length=1, max_length=1024)]
FileId = Annotated[str, Field(pattern=r"^ds_[0-9a-z]{8,40}$")]


class Hyperparameters(RequestBody):
    """The hyperparameters that OpenAI's API knows."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] | None = None
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=65536)] | None = None
    learning_rate_multiplier: Literal["auto"] | float | None = None

    @field_validator("learning_rate_multiplier")
    @classmethod
    def _refuse_multiplier(cls, value: str | float | None) -> str | float | None:
        if value not in (None, "auto"):
            raise ValueError("it multiplies nothing here: give training.learning_rate in the distillation")
        return value

    def fields(self) -> dict[str, dict[str, int]]:
        """The fields of the specification that are given, by their part."""
        parts: dict[str, dict[str, int]] = {}
        if isinstance(self.n_epochs, int):
            parts["curriculum"] = {"epochs_per_stage": self.n_epochs}
        if isinstance(self.batch_size, int):
            parts["training"] = {"batch_size": self.batch_size}
        return parts


class SupervisedMethod(RequestBody):
    """The parameters of training on answers."""

    hyperparameters: Hyperparameters | None = None


class MethodBody(RequestBody):
    """How the student is trained."""

    type: str
    supervised: SupervisedMethod | None = None
    distillation: dict[str, JsonValue] | None = None

    @field_validator("type")
    @classmethod
    def _check_type(cls, value: str) -> str:
        if value not in ("supervised", "distillation"):
            raise ValueError("this service distils: use `distillation`, or `supervised` to train on the answers alone")
        return value

    @model_validator(mode="after")
    def _match_type(self) -> Self:
        other = "distillation" if self.type == "supervised" else "supervised"
        if getattr(self, other) is not None:
            raise ValueError(f"`{other}` is given with the type `{self.type}`")
        return self


class WandbIntegration(RequestBody):
    """A run of Weights & Biases."""

    project: str
    name: str | None = None
    entity: str | None = None
    tags: tuple[str, ...] = ()


class Integration(RequestBody):
    """Where the metrics of the job go besides the service."""

    type: Literal["wandb"]
    wandb: WandbIntegration


class FineTuningJobCreate(RequestBody):
    """A job to be queued."""

    model: ModelName
    training_file: FileId
    validation_file: FileId | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    hyperparameters: Hyperparameters | None = None
    method: MethodBody | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    integrations: Annotated[tuple[Integration, ...], Field(max_length=1)] | None = None
    distillation: dict[str, JsonValue] | None = None


@dataclass(frozen=True)
class MappedJob:
    """A body as the service takes it, and where in the body each part of the specification stands."""

    spec: dict[str, Any]
    options: JobOptions
    prefix: str
    """The pointer to the distillation in the body; empty where there is none."""
    is_model_student: bool
    """Whether `model` is the student, rather than the teacher of one that the distillation describes."""

    def pointer_in_body(self, pointer: str) -> str:
        """Where in the body what is wrong at `pointer` of the specification or the options stands."""
        places = {
            "/data/train": "/training_file",
            "/data/validation": "/validation_file",
            "/labels": "/metadata",
            "/name": "/suffix",
            "/trackers": "/integrations",
            **({"/student": "/model"} if self.is_model_student else {}),
        }
        for start, place in places.items():
            if pointer == start or pointer.startswith(f"{start}/"):
                return place
        return f"{self.prefix}{pointer}"


def map_job(body: FineTuningJobCreate) -> MappedJob:
    """What the body asks for.

    Raises:
        Unprocessable: something in it stands there twice, or where the service does not take it.
    """
    method = body.method
    in_method = None if method is None else method.distillation
    if in_method is not None and body.distillation is not None and in_method != body.distillation:
        raise _refusal("/distillation", "given_twice", "It differs from method.distillation: give one of them.")
    given = in_method if in_method is not None else body.distillation
    if method is not None and method.type == "supervised" and given is not None:
        raise _refusal("/method/type", "method_differs", "`supervised` has no distillation: use `distillation`.")
    if method is not None and method.type == "distillation" and given is None:
        detail = "Say how the student is distilled, for instance {'teacher': 'my-teacher'}."
        raise _refusal("/method/distillation", "missing", detail)
    prefix = "" if given is None else "/method/distillation" if in_method is not None else "/distillation"
    spec: dict[str, Any] = {"method": "sft"} if given is None else dict(given)
    if isinstance(spec.get("teacher"), str):
        spec["teacher"] = model_reference(spec["teacher"])
    is_model_student = "student" not in spec
    if is_model_student:
        spec["student"] = model_reference(body.model)
    elif spec.get("teacher") != model_reference(body.model):
        detail = "Where the distillation has a student of its own, `model` names its teacher."
        raise _refusal("/model", "model_differs", detail)
    spec["data"] = _data(body, spec.get("data", {}), prefix)
    for pointer, parts in _hyperparameters(body):
        for part, fields in parts.items():
            spec[part] = _merge(spec.get(part, {}), fields, pointer)
    if body.seed is not None:
        spec = _merge(spec, {"seed": body.seed}, "/seed")
    return MappedJob(spec, _options(body), prefix, is_model_student)


def model_reference(name: str) -> dict[str, Any]:
    """A model by its name: the id of a checkpoint, `hub:owner/name@revision`, or a path below the model roots."""
    if _CHECKPOINT.fullmatch(name):
        return {"checkpoint": name}
    if name.startswith(_HUB):
        repo, _, revision = name.removeprefix(_HUB).partition("@")
        return {"hub": {"repo": repo, **({"revision": revision} if revision else {})}}
    return {"path": name}


def _data(body: FineTuningJobCreate, given: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise _refusal(f"{prefix}/data", "wrong_type", "It is not an object.")
    for name, hint in _ELSEWHERE.items():
        if name in given:
            raise _refusal(f"{prefix}/data/{name}", "given_elsewhere", f"It has no place here: {hint}.")
    data: dict[str, Any] = {**given, "train": {"dataset": body.training_file}}
    if body.validation_file is not None:
        data["validation"] = {"dataset": body.validation_file}
    return data


def _hyperparameters(body: FineTuningJobCreate) -> list[tuple[str, dict[str, dict[str, int]]]]:
    """The hyperparameters of both places, with the pointer to each."""
    supervised = None if body.method is None else body.method.supervised
    places = {
        "/hyperparameters": body.hyperparameters,
        "/method/supervised/hyperparameters": None if supervised is None else supervised.hyperparameters,
    }
    return [(pointer, given.fields()) for pointer, given in places.items() if given is not None]


def _merge(part: Any, fields: Mapping[str, Any], pointer: str) -> Any:
    """A part of the specification with these fields; what is no object stays as it is, and is refused as that.

    Raises:
        Unprocessable: it has one of them already, and another value of it.
    """
    if not isinstance(part, Mapping):
        return part
    for name, value in fields.items():
        if part.get(name, value) != value:
            raise _refusal(pointer, "given_twice", f"`{name}` stands in the distillation too, with another value.")
    return {**part, **fields}


def _options(body: FineTuningJobCreate) -> JobOptions:
    return JobOptions(
        name=body.suffix,
        labels=body.metadata or {},
        trackers=[_tracker(index, each.wandb) for index, each in enumerate(body.integrations or ())],
    )


def _tracker(index: int, given: WandbIntegration) -> WandbTracker:
    try:
        return WandbTracker(
            kind="wandb", project=given.project, run_name=given.name, entity=given.entity, tags=given.tags
        )
    except ValidationError as error:
        place = f"/integrations/{index}/wandb"
        errors = [replace(each, pointer=f"{place}{each.pointer}") for each in field_errors(error, WandbTracker)]
        raise Unprocessable(field_errors=errors) from None


def _refusal(pointer: str, code: str, detail: str) -> Unprocessable:
    return Unprocessable(field_errors=[FieldError(pointer, code, detail)])
