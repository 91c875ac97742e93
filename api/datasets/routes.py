"""Data sets over HTTP: upload, list, get, delete."""

from pathlib import PurePath

from fastapi import APIRouter, Request, Response

from api.auth import Caller
from api.client_shares import TRANSFER_ERRORS
from api.datasets.multipart import MultipartInvalid
from api.datasets.parameters import MAX_NAME_LENGTH
from api.datasets.schemas import DatasetPage, DatasetView
from api.datasets.upload import (
    FORM_FIELDS,
    FORMATS_BY_MEDIA_TYPE,
    MULTIPART,
    FileNotReadNow,
    StoredUploadDep,
    UploadTooLarge,
)
from api.dependencies import DatabaseDep, StoreDep
from api.idempotency.keys import KEY_ERRORS
from api.idempotency.writes import replayable_response
from api.pagination import After, Limit
from api.path_params import DatasetId
from api.prefix import location_of
from api.problems import COMMON_PROBLEMS, problem_responses
from api.sessions import ReadSession, TransactionSlot
from domain.datasets import ingestion, repository
from domain.errors import DatasetNotFound, StorageFull, Unprocessable, UnsupportedMediaType
from domain.jobs import dataset_deletion as deletion
from domain.jobs.dataset_deletion import DatasetIsNeeded
from pocl.errors import DatasetInvalid

router = APIRouter(prefix="/datasets", tags=["datasets"], responses=COMMON_PROBLEMS)

_FILE = {"type": "string", "format": "binary", "description": "JSONL, JSON, CSV or Parquet, or one of them in gzip."}
_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {"file": _FILE, **{name: {"type": "string"} for name in FORM_FIELDS}},
    "additionalProperties": False,
}
_UPLOAD_BODY = {
    "required": True,
    "content": {
        **{media_type: {"schema": _FILE} for media_type in FORMATS_BY_MEDIA_TYPE},
        MULTIPART: {"schema": _FORM},
    },
}


@router.post(
    "",
    status_code=201,
    summary="Upload a data set",
    response_model=DatasetView,
    responses=replayable_response(201, location=True)
    | problem_responses(
        Unprocessable,
        DatasetInvalid,
        MultipartInvalid,
        UploadTooLarge,
        UnsupportedMediaType,
        StorageFull,
        FileNotReadNow,
        *KEY_ERRORS,
        *TRANSFER_ERRORS,
    ),
    openapi_extra={"requestBody": _UPLOAD_BODY},
)
def upload_dataset(upload: StoredUploadDep, caller: Caller, request: Request) -> Response:
    """Send a file as the body, or as the part `file` of a form whose other fields are the parameters: JSONL, a JSON
    array, CSV or Parquet, also in gzip. Its rows are instructions with answers, messages, ShareGPT conversations or
    prompts with completions; format and form are detected unless given.

    Every row is checked. Rows that are no samples are named (`dataset_invalid`), and then nothing is stored, unless
    they are to be skipped. The response says what was detected, which columns no form uses, and what was skipped.
    """
    name = upload.parameters.name or _printable_name(upload.filename) or "untitled"
    with upload.write.transaction() as session:
        row = ingestion.add_dataset(session, upload.dataset, project=caller.project, name=name)
        location = location_of(request, "get_dataset", dataset_id=row.id)
        return upload.write.respond(DatasetView.model_validate(row), status=201, location=location)


@router.get("", summary="List data sets")
def list_datasets(session: ReadSession, caller: Caller, limit: Limit = 20, after: After = None) -> DatasetPage:
    """The project's data sets, newest first."""
    page = repository.list_datasets(session, caller.project, limit=limit, after=after)
    return DatasetPage.from_rows(page, DatasetView.model_validate, lambda row: row.id)


@router.get("/{dataset_id}", summary="Get a data set", responses=problem_responses(DatasetNotFound))
def get_dataset(session: ReadSession, caller: Caller, dataset_id: DatasetId) -> DatasetView:
    """One data set: its size, number of samples and digest."""
    return DatasetView.model_validate(repository.get_dataset(session, caller.project, dataset_id))


@router.delete(
    "/{dataset_id}",
    status_code=204,
    summary="Delete a data set",
    responses=problem_responses(DatasetNotFound, DatasetIsNeeded),
)
def delete_dataset(
    database: DatabaseDep, store: StoreDep, caller: Caller, dataset_id: DatasetId, _slot: TransactionSlot
) -> None:
    """Delete a data set and its file. One that a job needs which has not ended stays, and the jobs are named. A retry
    or branch of an ended job that used it is refused from then on.
    """
    with database.transaction(write=True) as session:
        key = deletion.delete_dataset(session, caller.project, dataset_id)
    # After the commit: a file without a row is removed in the end, a row without its file would stay for ever.
    store.remove(key)


def _printable_name(filename: str | None) -> str:
    """A client's file name without folders and unprintable characters."""
    name = PurePath((filename or "").replace("\\", "/")).name
    return "".join(character for character in name if character.isprintable())[:MAX_NAME_LENGTH]
