"""Rows of a data set as a run would train on them, over HTTP."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from sqlalchemy.orm import Session

from api.auth import Caller
from api.datasets.schemas import PreviewView
from api.dependencies import DatabaseDep, EncodingCheckerDep, SettingsDep, StoreDep
from api.http_limits import UriTooLong
from api.path_params import DatasetId
from api.problems import COMMON_PROBLEMS, STORE_ERRORS, problem_responses
from api.sessions import PlanningSlot
from api.strict_json import parse
from domain.artifacts import ArtifactCorrupt, ArtifactNotFound
from domain.checkpoints.repository import get_checkpoint
from domain.datasets.repository import (
    DatasetNotReady,
    DatasetRefused,
    get_dataset,
    require_ready,
    stored_reference,
)
from domain.encoding_checks import EncodingBusy
from domain.errors import (
    CheckpointExpired,
    CheckpointNotFound,
    DatasetNotFound,
    EngineRefusal,
    JsonInvalid,
    PathOutsideModelRoots,
    Unavailable,
    Unprocessable,
    engine_refusals,
)
from domain.model_paths import locate_model
from domain.settings import Settings
from pocl.errors import DatasetInvalid, FieldError, ModelNotFound, ModelUnsupported, SpecInvalid
from pocl.preview.encoder import EncodingAborted, EncodingInputs
from pocl.prompting.encoding_warnings import set_warnings
from pocl.spec import Data, RandomModel, field_errors

router = APIRouter(prefix="/datasets", tags=["datasets"], responses=COMMON_PROBLEMS)

_MODEL_POINTER: Final = "/query/model"
_RANDOM: Final = re.compile(r"random(?::(?P<family>\w+))?")
_CHECKPOINT: Final = re.compile(r"ckpt_[0-9a-z]{8,40}")


class RowsNotHere(Unavailable):
    """The rows or the model are not on this machine at present: try again later."""

    code = "files_not_here"


class PreviewTooCostly(Unprocessable):
    """The rows cannot be encoded within the service's limits on time and memory: ask for fewer, or for others."""

    code = EncodingAborted.code


class PreviewQuery(BaseModel):
    """What is shown of a data set, and how it becomes tokens. A setting that is left out has its default of `data`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str = Field(min_length=1, max_length=1024)
    """The model whose tokenizer and chat template are used: a path as specifications name it, the id of a checkpoint,
    or `random`."""
    offset: int = Field(default=0, ge=0, lt=2**31)
    """The first row to show, counted from 0."""
    rows: int = Field(default=5, ge=1, le=50)
    """How many rows to show at most."""
    template: Literal["auto", "chat", "alpaca"] | None = None
    """As `data.template`."""
    template_name: str | None = Field(default=None, min_length=1, max_length=64)
    """As `data.template_name`."""
    chat_template: str | None = Field(default=None, min_length=1, max_length=32768)
    """As `data.chat_template`, as far as the URL, percent-encoded, stays within 65535 bytes."""
    chat_template_kwargs: str | None = Field(default=None, min_length=2, max_length=8192)
    """As `data.chat_template_kwargs`: an object, as JSON."""
    system: str | None = Field(default=None, min_length=1, max_length=8192)
    """As `data.system`."""
    date: str | None = Field(default=None, pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")
    """As `data.date`; today unless given."""
    max_length: int | None = Field(default=None, ge=8, le=32768)
    """As `data.max_length`."""
    max_prompt_length: int | None = Field(default=None, ge=1, le=32767)
    """As `data.max_prompt_length`."""


@router.get(
    "/{dataset_id}/preview",
    summary="Preview a data set as tokens",
    responses=problem_responses(
        DatasetNotFound,
        CheckpointNotFound,
        CheckpointExpired,
        Unprocessable,
        SpecInvalid,
        DatasetInvalid,
        PathOutsideModelRoots,
        ModelNotFound,
        ModelUnsupported,
        PreviewTooCostly,
        EncodingBusy,
        RowsNotHere,
        DatasetNotReady,
        DatasetRefused,
        UriTooLong,
        *STORE_ERRORS,
    ),
)
def preview_dataset(
    database: DatabaseDep,
    _slot: PlanningSlot,
    caller: Caller,
    settings: SettingsDep,
    store: StoreDep,
    checker: EncodingCheckerDep,
    dataset_id: DatasetId,
    query: Annotated[PreviewQuery, Query()],
) -> PreviewView:
    """Rows as a run would train on them: the ids of their tokens, which of them are trained on, and what is cut and
    left out; with counts over the data set, as far as its rows were tried.
    """
    data = _data(dataset_id, query)
    with database.transaction(write=False) as session:
        dataset = require_ready(get_dataset(session, caller.project, dataset_id))
        tokenizer = _locate_tokenizer(session, settings, caller.project, query.model)
    try:
        path = store.locate(dataset.store_key)
    except (ArtifactNotFound, ArtifactCorrupt):
        raise RowsNotHere from None
    reference = stored_reference(dataset, path)
    inputs = EncodingInputs(data.model_copy(update={"train": reference}), tokenizer)
    try:
        with engine_refusals():
            page = checker.preview(inputs, skip=query.offset, rows=query.rows)
    except EncodingAborted as error:
        raise PreviewTooCostly(error.message) from error
    except EngineRefusal as refusal:
        raise _in_query(refusal) from refusal
    check = checker.check(inputs, digest=dataset.sha256)
    return PreviewView.model_validate(
        {
            "dataset": dataset.id,
            "model": query.model,
            "template": page.template,
            "end": page.end,
            "samples": dataset.rows,
            "offset": query.offset,
            "rows": page.rows,
            "tried": check.tried,
            "counts": check.counts,
            "refusal": None if check.refusal is None else check.refusal.message,
            "warnings": [each._asdict() for each in (*page.warnings, *set_warnings("the data set", check.counts))],
        }
    )


def _data(dataset_id: str, query: PreviewQuery) -> Data:
    settings = query.model_dump(exclude={"model", "offset", "rows"}, exclude_none=True)
    settings.setdefault("date", datetime.now(UTC).date())
    if query.chat_template_kwargs is not None:
        settings["chat_template_kwargs"] = _parse_object(query.chat_template_kwargs)
    try:
        return Data.model_validate({"train": {"dataset": dataset_id}, **settings})
    except ValidationError as error:
        raise _in_query(EngineRefusal(SpecInvalid(field_errors(error, Data)))) from None


def _parse_object(text: str) -> dict[str, JsonValue]:
    try:
        value = parse(text.encode())
    except JsonInvalid:
        value = None
    if not isinstance(value, dict):
        error = FieldError("/query/chat_template_kwargs", "not_an_object", "send one JSON object")
        raise Unprocessable(field_errors=[error])
    return value


def _in_query(refusal: EngineRefusal) -> EngineRefusal:
    """The refusal, with pointers to the parameters of the query instead of the fields of a specification."""
    refusal.field_errors = tuple(
        FieldError(f"/query/{each.pointer.removeprefix('/data').lstrip('/')}", each.code, each.detail)
        for each in refusal.field_errors
    ) or (FieldError(_MODEL_POINTER, refusal.code, refusal.detail),)
    return refusal


def _locate_tokenizer(session: Session, settings: Settings, project: str, model: str) -> Path | RandomModel:
    """
    Raises:
        PathOutsideModelRoots, EngineRefusal, CheckpointNotFound: there is no such model.
        RowsNotHere: its files are on another machine.
    """
    if match := _RANDOM.fullmatch(model):
        with engine_refusals(_MODEL_POINTER):
            try:
                return RandomModel.model_validate({"family": match["family"]} if match["family"] else {})
            except ValidationError:
                raise ModelNotFound("There is no freshly initialised model of this family.") from None
    if _CHECKPOINT.fullmatch(model):
        directory = settings.artifact_root / get_checkpoint(session, project, model).store_key
        if not directory.is_dir():
            raise RowsNotHere
        return directory
    path = locate_model(settings.model_roots, model, pointer=_MODEL_POINTER)
    if not path.is_dir():
        with engine_refusals(_MODEL_POINTER):
            raise ModelUnsupported(
                "Only the worker reads the tokenizer of a GGUF file: preview with a directory that has tokenizer.json."
            )
    return path
