"""Files as OpenAI's API has them: data sets that were uploaded, and the weights of checkpoints as archives."""

import re
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query, Request, Response

from api.archives import TarArchive
from api.auth import Caller
from api.datasets.routes import save_upload
from api.datasets.upload import StoredUploadDep
from api.datasets.validation import ValidatorDep
from api.dependencies import DatabaseDep, StoreDep
from api.downloads import load_manifest, serve_archive, serve_file
from api.openai.error_shape import PREFIX
from api.openai.schemas import FileDeleted, FileObject, ListPage, present_archive, present_dataset
from api.pagination import MAX_LIMIT
from api.sessions import ReadSession, TransactionSlot
from domain.checkpoints.repository import get_checkpoint
from domain.datasets import repository, validation
from domain.errors import NotFound, Unprocessable
from domain.jobs import dataset_deletion
from pocl.errors import FieldError

router = APIRouter(prefix="/files", include_in_schema=False)

_FINE_TUNE: Final = "fine-tune"
_DATASET: Final = re.compile(r"ds_[0-9a-z]{8,40}")
_CHECKPOINT: Final = re.compile(r"ckpt_[0-9a-z]{8,40}")

FileAfter = Annotated[str | None, Query(pattern=r"^[0-9a-z_]{1,64}$")]
FileLimit = Annotated[int, Query(ge=1, le=10_000)]


class FileNotFound(NotFound):
    """The project has no file of this id."""

    code = "file_not_found"


async def _accept_purpose(request: Request) -> None:
    request.state.upload_form_fields = ("purpose",)


@router.post("", status_code=200, dependencies=[Depends(_accept_purpose)])
def create_file(stored: StoredUploadDep, caller: Caller, validator: ValidatorDep) -> Response:
    """Make a data set of a file; its purpose is `fine-tune`."""
    purpose = stored.upload.form_fields.get("purpose")
    if purpose != _FINE_TUNE:
        raise _refuse_purpose("/purpose", "Files are for fine-tuning here: send the purpose `fine-tune`.")
    return save_upload(stored, caller.project, validator, present_dataset, lambda row: f"{PREFIX}/files/{row.id}")


@router.get("")
def list_files(
    session: ReadSession,
    caller: Caller,
    limit: FileLimit = MAX_LIMIT,
    after: FileAfter = None,
    purpose: str | None = None,
    order: str = "desc",
) -> ListPage[FileObject]:
    """The data sets, newest first, at most 100 a page."""
    if purpose not in (None, _FINE_TUNE):
        raise _refuse_purpose("/query/purpose", "Files of the purpose `fine-tune` are listed; jobs name their results.")
    if order != "desc":
        detail = "Files are listed from the newest on: leave it out, or send `desc`."
        raise Unprocessable(field_errors=[FieldError("/query/order", "not_supported", detail)])
    page = repository.list_datasets(session, caller.project, limit=min(limit, MAX_LIMIT), after=after)
    return ListPage.of(
        [present_dataset(row) for row in page.rows], [row.id for row in page.rows], has_more=page.has_more
    )


@router.get("/{file_id}")
def retrieve_file(session: ReadSession, caller: Caller, file_id: str, store: StoreDep) -> FileObject:
    """A data set, or the weights of a checkpoint."""
    if _CHECKPOINT.fullmatch(file_id):
        row = get_checkpoint(session, caller.project, file_id)
        manifest = load_manifest(store, row.store_key)
        return present_archive(row, TarArchive.create(manifest, folder=row.id, modified_at=row.created_at).size_bytes)
    return present_dataset(repository.get_dataset(session, caller.project, _dataset_id(file_id)))


@router.get("/{file_id}/content")
def download_file(session: ReadSession, caller: Caller, file_id: str, request: Request, store: StoreDep) -> Response:
    """The samples of a data set as they are stored, one JSON object a line; or a tar archive of a checkpoint."""
    if _CHECKPOINT.fullmatch(file_id):
        row = get_checkpoint(session, caller.project, file_id)
        return serve_archive(store, row.store_key, request, name=row.id, modified_at=row.created_at)
    dataset = repository.require_ready(repository.get_dataset(session, caller.project, _dataset_id(file_id)))
    return serve_file(store, dataset.store_key, dataset.sha256, dataset.size_bytes, request)


@router.delete("/{file_id}")
def delete_file(
    database: DatabaseDep, store: StoreDep, caller: Caller, file_id: str, _slot: TransactionSlot
) -> FileDeleted:
    """Delete a data set. A checkpoint is no file of the client's, and stays."""
    if _CHECKPOINT.fullmatch(file_id):
        raise Unprocessable("The weights of a job are deleted by DELETE /v1/checkpoints/{id}, and not as a file.")
    with database.transaction(write=True) as session:
        key = dataset_deletion.delete_dataset(session, caller.project, _dataset_id(file_id))
    # After the commit: a file without a row is removed in the end, a row without its file would stay for ever.
    store.discard(key)
    store.discard(validation.source_key(file_id))
    return FileDeleted(id=file_id)


def _dataset_id(file_id: str) -> str:
    """
    Raises:
        FileNotFound: it is shaped like no id of a data set.
    """
    if not _DATASET.fullmatch(file_id):
        raise FileNotFound
    return file_id


def _refuse_purpose(pointer: str, detail: str) -> Unprocessable:
    return Unprocessable(field_errors=[FieldError(pointer, "purpose_not_supported", detail)])
