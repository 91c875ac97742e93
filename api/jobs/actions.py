"""The life of a job over HTTP: pause, resume, cancel, retry, branch, rename, delete."""

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from api.auth import Caller
from api.idempotency.requests import KEY_ERRORS, IdempotentRequest, IdempotentRoute, replayable_response
from api.jobs.presenter import SPEC_ERRORS, pointing_into, present_job
from api.jobs.requests import BranchRequest, JobUpdate, PauseRequest, RetryRequest
from api.jobs.schemas import JobView
from api.path_params import JobId
from api.problems import COMMON_PROBLEMS, problem_responses
from api.sessions import WriteSession
from domain.errors import (
    BodyTooLarge,
    CheckpointNotFound,
    Conflict,
    IllegalTransition,
    JobNotFound,
    JsonInvalid,
    QuotaExceeded,
    Unprocessable,
    UnsupportedMediaType,
)
from domain.jobs import actions, lineage
from domain.jobs.actions import ActionResult, JobIsLive, JobIsNeeded
from domain.jobs.lineage import RetryStart, StageNotSaved

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=COMMON_PROBLEMS, route_class=IdempotentRoute)

_BODY_PROBLEMS = problem_responses(JsonInvalid, BodyTooLarge, UnsupportedMediaType)
_TRANSITION_RESPONSES = {
    200: {"model": JobView, "description": "It was asked for before: nothing changed."},
    **replayable_response(202),
    **problem_responses(JobNotFound, IllegalTransition, Conflict, Unprocessable, *KEY_ERRORS),
}
_LINEAGE_ERRORS = (
    JobNotFound,
    StageNotSaved,
    CheckpointNotFound,
    QuotaExceeded,
    Unprocessable,
    *SPEC_ERRORS,
    *KEY_ERRORS,
)
_LINEAGE_RESPONSES = {**_BODY_PROBLEMS, **replayable_response(201, location=True)}


@router.post("/{job_id}/cancel", status_code=202, summary="Cancel a job", responses=_TRANSITION_RESPONSES)
def cancel_job(
    session: WriteSession, _once: IdempotentRequest, caller: Caller, job_id: JobId, request: Request, response: Response
) -> JobView:
    """A job that waits ends at once; one that runs is `cancelling` until its worker has saved a checkpoint."""
    return _present_change(session, actions.cancel_job(session, caller.project, job_id), request, response)


@router.post(
    "/{job_id}/pause", status_code=202, summary="Pause a job", responses={**_TRANSITION_RESPONSES, **_BODY_PROBLEMS}
)
def pause_job(
    session: WriteSession,
    _once: IdempotentRequest,
    caller: Caller,
    job_id: JobId,
    request: Request,
    response: Response,
    body: PauseRequest | None = None,
) -> JobView:
    """The worker saves the job and lets it go, now or at the end of the stage. Paused, it takes no worker."""
    at = (body or PauseRequest()).at
    return _present_change(session, actions.pause_job(session, caller.project, job_id, at), request, response)


@router.post("/{job_id}/resume", status_code=202, summary="Resume a job", responses=_TRANSITION_RESPONSES)
def resume_job(
    session: WriteSession, _once: IdempotentRequest, caller: Caller, job_id: JobId, request: Request, response: Response
) -> JobView:
    """A paused job goes back into the queue, and on from where it was, to the same bits."""
    return _present_change(session, actions.resume_job(session, caller.project, job_id), request, response)


@router.post(
    "/{job_id}/retry",
    status_code=201,
    summary="Retry a job",
    responses={**_LINEAGE_RESPONSES, **problem_responses(JobIsLive, *_LINEAGE_ERRORS)},
)
def retry_job(
    session: WriteSession,
    _once: IdempotentRequest,
    caller: Caller,
    job_id: JobId,
    request: Request,
    response: Response,
    body: RetryRequest | None = None,
) -> JobView:
    """A new job with an ended one's specification: from its newest checkpoint, the end of a stage, or the start."""
    wanted = body or RetryRequest()
    job = lineage.retry_job(
        request.app.state.database,
        request.app.state.settings,
        project=caller.project,
        job_id=job_id,
        start=RetryStart(wanted.start, wanted.stage),
        options=wanted.options,
        session=session,
    )
    response.headers["location"] = str(request.app.url_path_for("get_job", job_id=job.id))
    return present_job(session, job, request.app.state.settings)


@router.post(
    "/{job_id}/branch",
    status_code=201,
    summary="Branch off a job",
    responses={**_LINEAGE_RESPONSES, **problem_responses(*_LINEAGE_ERRORS)},
)
def branch_job(
    session: WriteSession,
    _once: IdempotentRequest,
    caller: Caller,
    job_id: JobId,
    request: Request,
    response: Response,
    body: BranchRequest,
) -> JobView:
    """A new job that goes on from the end of a stage with other temperatures, another method or teacher. Ranking and
    stages before are not done again.
    """
    with pointing_into("changes"):
        job = lineage.branch_job(
            request.app.state.database,
            request.app.state.settings,
            project=caller.project,
            job_id=job_id,
            stage=body.stage,
            changes=body.changes,
            options=body.options,
            session=session,
        )
    response.headers["location"] = str(request.app.url_path_for("get_job", job_id=job.id))
    return present_job(session, job, request.app.state.settings)


@router.patch(
    "/{job_id}",
    summary="Change a job",
    responses={**_BODY_PROBLEMS, **problem_responses(JobNotFound, Conflict, Unprocessable)},
)
def update_job(session: WriteSession, caller: Caller, job_id: JobId, request: Request, body: JobUpdate) -> JobView:
    """Name, labels and priority; what is not named stays. Priority counts while the job waits."""
    job = actions.update_job(session, caller.project, job_id, body.changes)
    return present_job(session, job, request.app.state.settings)


@router.delete(
    "/{job_id}",
    status_code=204,
    summary="Delete a job",
    responses=problem_responses(JobNotFound, JobIsLive, JobIsNeeded),
)
def delete_job(session: WriteSession, caller: Caller, job_id: JobId) -> None:
    """Forget an ended job with its history, results and checkpoints. The files go soon after."""
    actions.delete_job(session, caller.project, job_id)


def _present_change(session: Session, result: ActionResult, request: Request, response: Response) -> JobView:
    response.status_code = 202 if result.changed else 200
    return present_job(session, result.job, request.app.state.settings)
