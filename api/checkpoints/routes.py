"""Checkpoints over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from api.auth import Caller
from api.checkpoints.schemas import CheckpointView
from api.client_shares import TRANSFER_ERRORS
from api.dependencies import StoreDep
from api.downloads import (
    ArtifactDamaged,
    ArtifactFileNotFound,
    RangeNotSatisfiable,
    download_responses,
    load_manifest,
    serve_directory_file,
)
from api.path_params import CheckpointId
from api.problems import COMMON_PROBLEMS, problem_responses
from api.sessions import ReadSession
from domain.checkpoints import repository
from domain.errors import CheckpointNotFound
from pocl.storage.manifest import Manifest

router = APIRouter(prefix="/checkpoints", tags=["checkpoints"], responses=COMMON_PROBLEMS)

FilePath = Annotated[
    str, Path(description="The path of a file as the manifest has it, for instance `model.safetensors`.")
]


@router.get("/{checkpoint_id}", summary="Get a checkpoint", responses=problem_responses(CheckpointNotFound))
def get_checkpoint(session: ReadSession, caller: Caller, checkpoint_id: CheckpointId) -> CheckpointView:
    """One checkpoint: where in which job it was saved, and its size."""
    return CheckpointView.model_validate(repository.get_checkpoint(session, caller.project, checkpoint_id))


@router.get(
    "/{checkpoint_id}/manifest",
    summary="List the files of a checkpoint",
    responses=problem_responses(CheckpointNotFound, ArtifactFileNotFound, ArtifactDamaged),
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
            CheckpointNotFound, ArtifactFileNotFound, RangeNotSatisfiable, ArtifactDamaged, *TRANSFER_ERRORS
        ),
    },
)
def download_checkpoint_file(
    session: ReadSession, caller: Caller, checkpoint_id: CheckpointId, path: FilePath, request: Request, store: StoreDep
) -> Response:
    """The bytes. A broken download goes on with `Range` and `If-Range`; `ETag` and `Repr-Digest` are the SHA-256."""
    row = repository.get_checkpoint(session, caller.project, checkpoint_id)
    return serve_directory_file(store, row.store_key, path, request)
