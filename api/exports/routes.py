"""Exports over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from sqlalchemy.orm import Session

from api.auth import Caller
from api.byte_ranges import RangeNotSatisfiable
from api.client_shares import TRANSFER_ERRORS
from api.dependencies import DatabaseDep, SettingsDep, StoreDep
from api.downloads import (
    ArtifactDamaged,
    ArtifactFileNotFound,
    download_responses,
    load_manifest,
    serve_directory_file,
)
from api.exports.schemas import CheckpointExportCreate, CheckpointExportPage, CheckpointExportView
from api.idempotency.keys import KEY_ERRORS
from api.idempotency.writes import PlannedWriteDep, replayable_response
from api.pagination import After, Limit
from api.path_params import CheckpointId, ExportId
from api.prefix import location_of
from api.problems import BODY_PROBLEMS, COMMON_PROBLEMS, STORE_ERRORS, problem_responses
from api.sessions import ReadSession, TransactionSlot
from api.strict_json import StrictJsonRoute
from domain.checkpoints.repository import get_checkpoint
from domain.errors import CheckpointExpired, CheckpointNotFound, Conflict, QuotaExceeded
from domain.exports import repository
from domain.exports.repository import ExportNotFound
from domain.jobs import export_requests
from pocl.errors import GgufUnsupported
from pocl.storage.manifest import Manifest

router = APIRouter(
    prefix="/checkpoints/{checkpoint_id}/exports",
    tags=["checkpoints"],
    responses=COMMON_PROBLEMS,
    route_class=StrictJsonRoute,
)

FilePath = Annotated[
    str, Path(description="The path of a file as the manifest has it, for instance `model-q8_0.gguf`.")
]


class ExportNotComplete(Conflict):
    """The export has no files yet, or failed: wait until its `state` is `complete`, or ask for it again."""

    code = "export_not_complete"


_ABSENT = (CheckpointNotFound, CheckpointExpired)
_ONE_ABSENT = (*_ABSENT, ExportNotFound)


@router.post(
    "",
    status_code=202,
    summary="Export a checkpoint as GGUF",
    response_model=CheckpointExportView,
    responses={
        200: {"model": CheckpointExportView, "description": "It is under way or complete already: nothing changed."},
        **replayable_response(202, location=True),
        **BODY_PROBLEMS,
        **problem_responses(*_ABSENT, GgufUnsupported, QuotaExceeded, *STORE_ERRORS, *KEY_ERRORS),
    },
)
def create_export(
    checkpoint_id: CheckpointId,
    body: CheckpointExportCreate,
    write: PlannedWriteDep,
    caller: Caller,
    settings: SettingsDep,
    store: StoreDep,
    database: DatabaseDep,
    request: Request,
) -> Response:
    """Have a worker write a checkpoint as a GGUF file with an Ollama Modelfile, for llama.cpp, Ollama and LM Studio.
    There is one export of a checkpoint in each format: asking again changes nothing, unless it failed; then it is tried
    again. Follow its `state` by GET.
    """
    with database.transaction(write=False) as session:
        checkpoint = get_checkpoint(session, caller.project, checkpoint_id)
    # Outside of any transaction: the store may be far away.
    export_requests.check_exportable(store, checkpoint)
    with write.transaction() as session:
        result = export_requests.request_export(session, settings, caller.project, checkpoint_id, body.format)
        location = location_of(request, "get_export", checkpoint_id=checkpoint_id, export_id=result.export.id)
        view = CheckpointExportView.from_row(result.export)
        return write.respond(view, status=202 if result.changed else 200, location=location)


@router.get("", summary="List the exports of a checkpoint", responses=problem_responses(*_ABSENT))
def list_exports(
    session: ReadSession, caller: Caller, checkpoint_id: CheckpointId, limit: Limit = 20, after: After = None
) -> CheckpointExportPage:
    """The exports of a checkpoint, newest first: one of each format at most."""
    checkpoint = get_checkpoint(session, caller.project, checkpoint_id)
    page = repository.list_exports(session, checkpoint.id, limit=limit, after=after)
    return CheckpointExportPage.from_rows(page, CheckpointExportView.from_row, lambda row: row.id)


@router.get("/{export_id}", summary="Get an export", responses=problem_responses(*_ONE_ABSENT))
def get_export(
    session: ReadSession, caller: Caller, checkpoint_id: CheckpointId, export_id: ExportId
) -> CheckpointExportView:
    """One export: whether its files are there, and why not."""
    get_checkpoint(session, caller.project, checkpoint_id)
    return CheckpointExportView.from_row(repository.get_export(session, caller.project, checkpoint_id, export_id))


@router.delete("/{export_id}", status_code=204, summary="Delete an export", responses=problem_responses(*_ONE_ABSENT))
def delete_export(
    database: DatabaseDep,
    store: StoreDep,
    caller: Caller,
    checkpoint_id: CheckpointId,
    export_id: ExportId,
    _slot: TransactionSlot,
) -> None:
    """Delete an export and its files, or end it where it is under way. The checkpoint stays."""
    with database.transaction(write=True) as session:
        key = export_requests.delete_export(session, caller.project, checkpoint_id, export_id)
    # After the commit, as those of a checkpoint.
    if key is not None:
        store.discard(key)


@router.get(
    "/{export_id}/manifest",
    summary="List the files of an export",
    responses=problem_responses(*_ONE_ABSENT, ExportNotComplete, ArtifactFileNotFound, ArtifactDamaged, *STORE_ERRORS),
)
def get_export_manifest(
    session: ReadSession, caller: Caller, checkpoint_id: CheckpointId, export_id: ExportId, store: StoreDep
) -> Manifest:
    """Each file with its size and SHA-256: the GGUF file, the Modelfile, and the manifest itself."""
    return load_manifest(store, _stored(session, caller.project, checkpoint_id, export_id))


@router.get(
    "/{export_id}/files/{path:path}",
    summary="Download a file of an export",
    response_class=Response,
    responses={
        **download_responses(),
        **problem_responses(
            *_ONE_ABSENT,
            ExportNotComplete,
            ArtifactFileNotFound,
            RangeNotSatisfiable,
            ArtifactDamaged,
            *TRANSFER_ERRORS,
            *STORE_ERRORS,
        ),
    },
)
def download_export_file(
    session: ReadSession,
    caller: Caller,
    checkpoint_id: CheckpointId,
    export_id: ExportId,
    path: FilePath,
    request: Request,
    store: StoreDep,
) -> Response:
    """The bytes. A broken download goes on with `Range` and `If-Range`; `ETag` and `Repr-Digest` are the SHA-256."""
    key = _stored(session, caller.project, checkpoint_id, export_id)
    return serve_directory_file(store, key, path, request)


def _stored(session: Session, project: str, checkpoint_id: str, export_id: str) -> str:
    """The store key of a complete export.

    Raises:
        CheckpointNotFound, CheckpointExpired, ExportNotFound: there is no such export.
        ExportNotComplete: it has no files.
    """
    get_checkpoint(session, project, checkpoint_id)
    row = repository.get_export(session, project, checkpoint_id, export_id)
    if row.store_key is None:
        raise ExportNotComplete
    return row.store_key
