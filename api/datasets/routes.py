"""Data sets over HTTP: upload, list, get, delete."""

import json
from collections.abc import Callable
from pathlib import PurePath

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from api.auth import Caller
from api.client_shares import TRANSFER_ERRORS
from api.datasets.multipart import MultipartInvalid
from api.datasets.parameters import MAX_NAME_LENGTH, UploadParameters
from api.datasets.schemas import DatasetPage, DatasetView, present_dataset
from api.datasets.upload import (
    FORM_FIELDS,
    FORMATS_BY_MEDIA_TYPE,
    JSONL_TYPES,
    MULTIPART,
    FileNotReadNow,
    StoredUpload,
    StoredUploadDep,
    UploadTooLarge,
)
from api.datasets.validation import DatasetValidator, ValidatorDep
from api.dependencies import DatabaseDep, StoreDep
from api.idempotency.keys import KEY_ERRORS
from api.idempotency.writes import replayable_response
from api.pagination import After, Limit
from api.path_params import DatasetId
from api.prefix import location_of
from api.problems import COMMON_PROBLEMS, STORE_ERRORS, problem_responses
from api.sessions import ReadSession, TransactionSlot
from domain.datasets import ingestion, repository, validation
from domain.datasets.models import Dataset
from domain.errors import DatasetNotFound, QuotaExceeded, StorageFull, Unprocessable, UnsupportedMediaType
from domain.ids import new_id
from domain.jobs import dataset_deletion as deletion
from domain.jobs.dataset_deletion import DatasetIsNeeded
from domain.jobs.quotas import admit_file
from pocl.errors import DatasetInvalid

router = APIRouter(prefix="/datasets", tags=["datasets"], responses=COMMON_PROBLEMS)

_ACCEPTED = replayable_response(202, location=True)[202]
_FILE = {"type": "string", "format": "binary", "description": "JSONL, JSON, CSV or Parquet, or one of them in gzip."}
_FIELDS = {
    name: {"type": "string", "description": str(UploadParameters.model_fields[name].description)}
    for name in FORM_FIELDS
}
_FORM = {
    "title": "DatasetUpload",
    "type": "object",
    "description": "A file, and how it is to be read; what the form leaves out may be said in the query.",
    "required": ["file"],
    "properties": {"file": _FILE, **_FIELDS},
    "additionalProperties": False,
}
_ROW = {"instruction": "What is the capital of Australia?", "output": "Canberra."}
_EXAMPLES = {
    **dict.fromkeys(JSONL_TYPES, f"{json.dumps(_ROW)}\n"),
    "application/json": json.dumps([_ROW]),
    "text/csv": f"{','.join(_ROW)}\n{','.join(_ROW.values())}\n",
    "text/tab-separated-values": "\n".join("\t".join(each) for each in (_ROW, _ROW.values())),
}
"""One sample in each format that is text."""
_UPLOAD_BODY = {
    "required": True,
    "content": {
        **{
            media_type: {"schema": _FILE} | ({"example": _EXAMPLES[media_type]} if media_type in _EXAMPLES else {})
            for media_type in FORMATS_BY_MEDIA_TYPE
        },
        MULTIPART: {"schema": _FORM, "example": {"file": _EXAMPLES["application/jsonl"], "name": "capitals"}},
    },
}


@router.post(
    "",
    status_code=201,
    summary="Upload a data set",
    response_model=DatasetView,
    responses=replayable_response(201, location=True)
    | {202: {"model": DatasetView, "description": "The file is large, and is read from now on.", **_ACCEPTED}}
    | problem_responses(
        Unprocessable,
        DatasetInvalid,
        MultipartInvalid,
        UploadTooLarge,
        UnsupportedMediaType,
        StorageFull,
        FileNotReadNow,
        QuotaExceeded,
        *KEY_ERRORS,
        *TRANSFER_ERRORS,
        *STORE_ERRORS,
    ),
    openapi_extra={"requestBody": _UPLOAD_BODY},
)
def upload_dataset(stored: StoredUploadDep, caller: Caller, request: Request, validator: ValidatorDep) -> Response:
    """Send a file as the body, or as the part `file` of a form whose other fields are the parameters: JSONL, a JSON
    array, CSV or Parquet, also in gzip. Its rows are instructions with answers, messages, ShareGPT conversations or
    prompts with completions; format and form are detected unless given.

    Every row is checked. Rows that are no samples are named (`dataset_invalid`), and then nothing is stored, unless
    they are to be skipped. The response says what was detected, which columns no form uses, and what was skipped.

    A file beyond `POCL_SYNC_UPLOAD_BYTES` (16 MiB) is answered by 202 once it has arrived: its data set is
    `validating`, and becomes `ready` or `refused`, whether the client waits for it or not.
    """

    def locate(row: Dataset) -> str:
        return location_of(request, "get_dataset", dataset_id=row.id)

    return save_upload(stored, caller.project, validator, present_dataset, locate)


def save_upload(
    stored: StoredUpload,
    project: str,
    validator: DatasetValidator,
    present: Callable[[Dataset], BaseModel],
    locate: Callable[[Dataset], str],
) -> Response:
    """Make a data set of an upload.

    Args:
        present: makes the resource that the response has.
        locate: the address of that resource.

    Raises:
        QuotaExceeded: the project has as many bytes as it may.
        KeyInProgress, KeyReused, Replay: as of :meth:`~api.idempotency.writes.IdempotentWrite.transaction`.
    """
    name = stored.parameters.name or _printable_name(stored.upload.filename) or "untitled"
    if stored.dataset is not None:
        with stored.write.transaction() as session:
            admit_file(session, project, stored.dataset.file.size)
            row = ingestion.add_dataset(session, stored.dataset, project=project, name=name)
            return stored.write.respond(present(row), status=201, location=locate(row))
    # A large upload is answered before it is read.
    dataset_id = new_id("ds")
    source = stored.upload.publish(stored.upload.path, validation.source_key(dataset_id), link=True)
    with stored.write.transaction() as session:
        # By the file as it came; what is stored of it counts from then on.
        admit_file(session, project, source.size)
        row = validation.add_validating(
            session,
            dataset_id=dataset_id,
            project=project,
            name=name,
            store_key=ingestion.samples_key(dataset_id),
            options=stored.parameters.read_options(),
            format_hint=stored.upload.format_hint,
        )
        response = stored.write.respond(present(row), status=202, location=locate(row))
    validator.wake()
    return response


@router.get("", summary="List data sets")
def list_datasets(session: ReadSession, caller: Caller, limit: Limit = 20, after: After = None) -> DatasetPage:
    """The project's data sets, newest first."""
    page = repository.list_datasets(session, caller.project, limit=limit, after=after)
    return DatasetPage.from_rows(page, present_dataset, lambda row: row.id)


@router.get("/{dataset_id}", summary="Get a data set", responses=problem_responses(DatasetNotFound))
def get_dataset(session: ReadSession, caller: Caller, dataset_id: DatasetId) -> DatasetView:
    """One data set: its size, number of samples and digest; of one that was refused, why."""
    return present_dataset(repository.get_dataset(session, caller.project, dataset_id))


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
    store.discard(key)
    store.discard(validation.source_key(dataset_id))


def _printable_name(filename: str | None) -> str:
    """A client's file name without folders and unprintable characters."""
    name = PurePath((filename or "").replace("\\", "/")).name
    return "".join(character for character in name if character.isprintable())[:MAX_NAME_LENGTH]
