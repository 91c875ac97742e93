"""The trackers of a job over HTTP: what each has of the job's metrics, and the files that some make."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from api.auth import Caller
from api.byte_ranges import RangeNotSatisfiable
from api.client_shares import TRANSFER_ERRORS
from api.dependencies import StoreDep
from api.downloads import ArtifactDamaged, ArtifactFileNotFound, download_responses, serve_file
from api.enumerations import TrackerFileKind
from api.jobs.schemas import TrackerList, TrackerView
from api.path_params import JobId
from api.problems import COMMON_PROBLEMS, problem_responses
from api.sessions import ReadSession
from api.strict_json import StrictJsonRoute
from domain.errors import JobNotFound, NotFound
from domain.jobs import repository
from domain.trackers.repository import list_trackers

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=COMMON_PROBLEMS, route_class=StrictJsonRoute)

FileKind = Annotated[TrackerFileKind, Path(description="A tracker that makes a file, for instance `tensorboard`.")]


class TrackerFileNotReady(NotFound):
    """The job asks for no such file, or it is not made yet: `/trackers` of the job says what is to come."""

    code = "tracker_file_not_ready"


@router.get("/{job_id}/trackers", summary="List the trackers of a job", responses=problem_responses(JobNotFound))
def list_job_trackers(session: ReadSession, caller: Caller, job_id: JobId) -> TrackerList:
    """Where the metrics of the job go besides the service, how much of them each tracker has, and what went wrong."""
    job = repository.get_job(session, caller.project, job_id)
    return TrackerList(
        data=[
            TrackerView.model_validate(
                {
                    **{name: getattr(row, name) for name in TrackerView.model_fields.keys() - {"step"}},
                    "step": max(row.last_steps.values(), default=0),
                }
            )
            for row in list_trackers(session, job.id)
        ]
    )


@router.get(
    "/{job_id}/trackers/{kind}/file",
    summary="Download the file of a tracker",
    response_class=Response,
    responses={
        **download_responses("application/octet-stream"),
        **problem_responses(
            JobNotFound,
            TrackerFileNotReady,
            ArtifactFileNotFound,
            RangeNotSatisfiable,
            ArtifactDamaged,
            *TRANSFER_ERRORS,
        ),
    },
)
def download_tracker_file(
    session: ReadSession, caller: Caller, job_id: JobId, kind: FileKind, request: Request, store: StoreDep
) -> Response:
    """The metrics of the job as an event file for TensorBoard, or as a file for `wandb sync`. It is made when the job
    ends or pauses, and now and then while it runs.
    """
    job = repository.get_job(session, caller.project, job_id)
    artifact = repository.get_artifact(session, job.id, kind)
    if artifact is None:
        raise TrackerFileNotReady
    return serve_file(store, artifact.store_key, artifact.sha256, artifact.size_bytes, request)
