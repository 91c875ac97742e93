"""Data sets over HTTP: upload, list, get."""

from pathlib import PurePath
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api.auth import Caller
from api.datasets.multipart import MultipartInvalid
from api.datasets.schemas import DatasetPage, DatasetView
from api.datasets.upload import JSONL_TYPES, MULTIPART, ReceivedUpload, StorageFull, UploadTooLarge, UploadWriteDep
from api.idempotency.keys import KEY_ERRORS
from api.idempotency.writes import replayable_response
from api.pagination import After, Limit
from api.path_params import DatasetId
from api.problems import COMMON_PROBLEMS, problem_responses
from api.sessions import ReadSession
from domain.datasets import ingestion, repository
from domain.errors import DatasetNotFound, Unprocessable, UnsupportedMediaType
from pocl.errors import DatasetInvalid

router = APIRouter(prefix="/datasets", tags=["datasets"], responses=COMMON_PROBLEMS)

_FILE = {"type": "string", "format": "binary", "description": "One JSON object on each line."}
_FORM = {"type": "object", "required": ["file"], "properties": {"file": _FILE}, "additionalProperties": False}
_UPLOAD_BODY = {
    "required": True,
    "content": {
        **{media_type: {"schema": _FILE} for media_type in JSONL_TYPES},
        MULTIPART: {"schema": _FORM},
    },
}
_NAME_LENGTH = 200


@router.post(
    "",
    status_code=201,
    summary="Upload a data set",
    response_model=DatasetView,
    responses=replayable_response(201, location=True)
    | problem_responses(
        Unprocessable, DatasetInvalid, MultipartInvalid, UploadTooLarge, UnsupportedMediaType, StorageFull, *KEY_ERRORS
    ),
    openapi_extra={"requestBody": _UPLOAD_BODY},
)
def upload_dataset(
    upload: ReceivedUpload,
    write: UploadWriteDep,
    caller: Caller,
    request: Request,
    name: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=_NAME_LENGTH,
            pattern=r"^[^\x00-\x1f\x7f]+$",
            description="The name that people call the data set; the name of the file in a form unless given.",
        ),
    ] = None,
) -> Response:
    """Send JSONL as the body, or as the part `file` of a form: samples with `instruction`, `input` and `output`, or
    with `messages`. Every sample is checked: bad ones are named by line (`dataset_invalid`), and then nothing is
    stored.
    """
    stored = ingestion.store_dataset(upload.path, upload.publish)
    name = name or _printable_name(upload.filename) or "untitled"
    with write.transaction() as session:
        row = ingestion.add_dataset(session, stored, project=caller.project, name=name)
        location = str(request.app.url_path_for("get_dataset", dataset_id=row.id))
        return write.respond(DatasetView.model_validate(row), status=201, location=location)


@router.get("", summary="List data sets")
def list_datasets(session: ReadSession, caller: Caller, limit: Limit = 20, after: After = None) -> DatasetPage:
    """The project's data sets, newest first."""
    page = repository.list_datasets(session, caller.project, limit=limit, after=after)
    return DatasetPage.from_rows(page, DatasetView.model_validate, lambda row: row.id)


@router.get("/{dataset_id}", summary="Get a data set", responses=problem_responses(DatasetNotFound))
def get_dataset(session: ReadSession, caller: Caller, dataset_id: DatasetId) -> DatasetView:
    """One data set: its size, number of samples and digest."""
    return DatasetView.model_validate(repository.get_dataset(session, caller.project, dataset_id))


def _printable_name(filename: str | None) -> str:
    """A client's file name without folders and unprintable characters."""
    name = PurePath((filename or "").replace("\\", "/")).name
    return "".join(character for character in name if character.isprintable())[:_NAME_LENGTH]
