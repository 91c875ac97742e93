"""Checkpoints over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from api.auth import Caller
from api.byte_ranges import RangeNotSatisfiable
from api.checkpoints.schemas import CheckpointPage, CheckpointView, checkpoint_presenter
from api.client_shares import TRANSFER_ERRORS
from api.dependencies import DatabaseDep, StoreDep
from api.downloads import (
    ARCHIVE_MEDIA_TYPE,
    ArtifactDamaged,
    ArtifactFileNotFound,
    download_responses,
    load_manifest,
    serve_archive,
    serve_directory_file,
)
from api.idempotency.keys import KEY_ERRORS
from api.idempotency.writes import IdempotentWrite, IdempotentWriteDep, replayable_response
from api.pagination import After, Limit
from api.path_params import CheckpointId
from api.principal import Principal
from api.problems import COMMON_PROBLEMS, STORE_ERRORS, problem_responses
from api.sessions import ReadSession, TransactionSlot
from domain.checkpoints import repository
from domain.errors import CheckpointExpired, CheckpointNotFound
from domain.jobs import checkpoint_deletion as deletion
from domain.jobs.checkpoint_deletion import CheckpointIsNeeded, CheckpointIsPinned
from pocl.events import CheckpointKind
from pocl.storage.manifest import Manifest

router = APIRouter(prefix="/checkpoints", tags=["checkpoints"], responses=COMMON_PROBLEMS)

FilePath = Annotated[
    str, Path(description="The path of a file as the manifest has it, for instance `model.safetensors`.")
]

_ABSENT = (CheckpointNotFound, CheckpointExpired)
_DOWNLOAD_ERRORS = (
    ArtifactFileNotFound,
    RangeNotSatisfiable,
    ArtifactDamaged,
    *TRANSFER_ERRORS,
    *STORE_ERRORS,
)
_PIN_RESPONSES = {**replayable_response(200), **problem_responses(*_ABSENT, *KEY_ERRORS)}

JobFilter = Annotated[
    str | None, Query(pattern=r"^[0-9a-z_]{1,64}$", description="The id of the job whose checkpoints to list.")
]
StageFilter = Annotated[
    int | None, Query(ge=0, lt=2**31, description="The stage, counted from 0, whose checkpoints to list.")
]
Kinds = Annotated[
    list[CheckpointKind],
    Query(
        default_factory=list,
        max_length=4,
        description="The kinds of the checkpoints to list, any of them; may be repeated.",
    ),
]
PinnedFilter = Annotated[
    bool | None, Query(description="Whether to list the pinned checkpoints alone, or those that are not pinned.")
]


@router.get("", summary="List checkpoints")
def list_checkpoints(
    session: ReadSession,
    caller: Caller,
    kind: Kinds,
    job: JobFilter = None,
    stage: StageFilter = None,
    pinned: PinnedFilter = None,
    limit: Limit = 20,
    after: After = None,
) -> CheckpointPage:
    """The project's checkpoints, newest first. Those that were deleted are not listed."""
    page = repository.list_checkpoints(
        session, caller.project, limit=limit, after=after, job_id=job, stage=stage, kinds=kind, pinned=pinned
    )
    present = checkpoint_presenter(session, caller.project, page.rows)
    return CheckpointPage.from_rows(page, present, lambda row: row.id)


@router.get("/{checkpoint_id}", summary="Get a checkpoint", responses=problem_responses(*_ABSENT))
def get_checkpoint(session: ReadSession, caller: Caller, checkpoint_id: CheckpointId) -> CheckpointView:
    """One checkpoint: where in which job it was saved, and its size."""
    row = repository.get_checkpoint(session, caller.project, checkpoint_id)
    return checkpoint_presenter(session, caller.project, [row])(row)


@router.delete(
    "/{checkpoint_id}",
    status_code=204,
    summary="Delete a checkpoint",
    responses=problem_responses(*_ABSENT, CheckpointIsNeeded, CheckpointIsPinned),
)
def delete_checkpoint(
    database: DatabaseDep, store: StoreDep, caller: Caller, checkpoint_id: CheckpointId, _slot: TransactionSlot
) -> None:
    """Delete a checkpoint and its files. One that is pinned stays, and so does one that a job needs: as a model, to
    start or resume from, or for a retry of it to start from. Its id answers 410 from then on.
    """
    with database.transaction(write=True) as session:
        key = deletion.delete_checkpoint(session, caller.project, checkpoint_id)
    # After the commit: a row without its files would be served as damaged, files without a row are removed in the end.
    store.discard(key)


@router.post(
    "/{checkpoint_id}/pin", summary="Pin a checkpoint", response_model=CheckpointView, responses=_PIN_RESPONSES
)
def pin_checkpoint(write: IdempotentWriteDep, caller: Caller, checkpoint_id: CheckpointId) -> Response:
    """Keep a checkpoint whatever the retention policy says, until it is unpinned; it cannot be deleted meanwhile, nor
    its job. Repeating the request changes nothing.
    """
    return _set_pinned(write, caller, checkpoint_id, pinned=True)


@router.post(
    "/{checkpoint_id}/unpin", summary="Unpin a checkpoint", response_model=CheckpointView, responses=_PIN_RESPONSES
)
def unpin_checkpoint(write: IdempotentWriteDep, caller: Caller, checkpoint_id: CheckpointId) -> Response:
    """Let the retention policy decide over a checkpoint again. Repeating the request changes nothing."""
    return _set_pinned(write, caller, checkpoint_id, pinned=False)


def _set_pinned(write: IdempotentWrite, caller: Principal, checkpoint_id: str, *, pinned: bool) -> Response:
    with write.transaction() as session:
        row = deletion.pin_checkpoint(session, caller.project, checkpoint_id, pinned=pinned)
        return write.respond(checkpoint_presenter(session, caller.project, [row])(row), status=200)


@router.get(
    "/{checkpoint_id}/manifest",
    summary="List the files of a checkpoint",
    responses=problem_responses(*_ABSENT, ArtifactFileNotFound, ArtifactDamaged, *STORE_ERRORS),
)
def get_checkpoint_manifest(
    session: ReadSession, caller: Caller, checkpoint_id: CheckpointId, store: StoreDep
) -> Manifest:
    """Each file with its size and SHA-256: enough to download them all and to know that they arrived whole."""
    row = repository.get_checkpoint(session, caller.project, checkpoint_id)
    return load_manifest(store, row.store_key)


@router.get(
    "/{checkpoint_id}/files/{path:path}",
    summary="Download a file of a checkpoint",
    response_class=Response,
    responses={
        **download_responses(),
        **problem_responses(
            *_ABSENT, ArtifactFileNotFound, RangeNotSatisfiable, ArtifactDamaged, *TRANSFER_ERRORS, *STORE_ERRORS
        ),
    },
)
def download_checkpoint_file(
    session: ReadSession, caller: Caller, checkpoint_id: CheckpointId, path: FilePath, request: Request, store: StoreDep
) -> Response:
    """The bytes. A broken download goes on with `Range` and `If-Range`; `ETag` and `Repr-Digest` are the SHA-256."""
    row = repository.get_checkpoint(session, caller.project, checkpoint_id)
    return serve_directory_file(store, row.store_key, path, request)


@router.get(
    "/{checkpoint_id}/archive",
    summary="Download a checkpoint as one archive",
    response_class=Response,
    responses={
        **download_responses(ARCHIVE_MEDIA_TYPE),
        **problem_responses(
            *_ABSENT, ArtifactFileNotFound, RangeNotSatisfiable, ArtifactDamaged, *TRANSFER_ERRORS, *STORE_ERRORS
        ),
    },
)
def download_checkpoint_archive(
    session: ReadSession, caller: Caller, checkpoint_id: CheckpointId, request: Request, store: StoreDep
) -> Response:
    """All files as one tar stream, which unpacks to a directory named by the id; `manifest.json` in it has the SHA-256
    of each. Its length is known and its bytes are always the same: a broken download goes on with `Range` and
    `If-Range`.
    """
    row = repository.get_checkpoint(session, caller.project, checkpoint_id)
    return serve_archive(store, row.store_key, request, name=row.id, modified_at=row.created_at)
