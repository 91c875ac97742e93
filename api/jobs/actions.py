"""Actions on a job over HTTP: pause, resume, cancel, retry, branch, update, delete."""

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from api.auth import Caller
from api.dependencies import DatabaseDep, EncodingCheckerDep, SettingsDep
from api.idempotency.keys import KEY_ERRORS
from api.idempotency.writes import IdempotentWrite, IdempotentWriteDep, PlannedWriteDep, replayable_response
from api.jobs.presenter import present_job
from api.jobs.requests import BranchRequest, JobUpdate, PauseRequest, RetryRequest
from api.jobs.schemas import JobView
from api.path_params import JobId
from api.prefix import location_of
from api.problems import BODY_PROBLEMS, COMMON_PROBLEMS, problem_responses
from api.sessions import WriteSession
from api.strict_json import StrictJsonRoute
from domain.errors import (
    SPEC_ERRORS,
    CheckpointNotFound,
    Conflict,
    IllegalTransition,
    JobNotFound,
    QuotaExceeded,
    Unprocessable,
)
from domain.jobs import actions, lineage
from domain.jobs.actions import ActionResult, JobIsLive, JobIsNeeded
from domain.jobs.lineage import BranchPointDeleted, JobHasSucceeded, RetryStart, StageNotSaved
from domain.settings import Settings
from domain.webhooks.outbox import write_messages_about

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=COMMON_PROBLEMS, route_class=StrictJsonRoute)

_TRANSITION_RESPONSES = {
    200: {"model": JobView, "description": "The same action was requested before: nothing changed."},
    **replayable_response(202),
    **problem_responses(JobNotFound, IllegalTransition, Conflict, Unprocessable, *KEY_ERRORS),
}
_DESCENDANT_ERRORS = (
    JobNotFound,
    StageNotSaved,
    CheckpointNotFound,
    QuotaExceeded,
    Unprocessable,
    *SPEC_ERRORS,
    *KEY_ERRORS,
)


@router.post(
    "/{job_id}/cancel",
    status_code=202,
    summary="Cancel a job",
    response_model=JobView,
    responses=_TRANSITION_RESPONSES,
)
def cancel_job(write: IdempotentWriteDep, caller: Caller, job_id: JobId, settings: SettingsDep) -> Response:
    """Cancel a job. A job that waits ends at once; one that runs is `cancelling` until its worker has saved a
    checkpoint.
    """
    with write.transaction() as session:
        return _respond(write, session, actions.cancel_job(session, caller.project, job_id), settings)


@router.post(
    "/{job_id}/pause",
    status_code=202,
    summary="Pause a job",
    response_model=JobView,
    responses={**_TRANSITION_RESPONSES, **BODY_PROBLEMS},
)
def pause_job(
    write: IdempotentWriteDep,
    caller: Caller,
    job_id: JobId,
    settings: SettingsDep,
    body: PauseRequest | None = None,
) -> Response:
    """Pause a job. Its worker saves it and releases it, now or at the end of the stage; a paused job holds no
    worker.
    """
    at = (body or PauseRequest()).at
    with write.transaction() as session:
        return _respond(write, session, actions.pause_job(session, caller.project, job_id, at), settings)


@router.post(
    "/{job_id}/resume",
    status_code=202,
    summary="Resume a job",
    response_model=JobView,
    responses=_TRANSITION_RESPONSES,
)
def resume_job(write: IdempotentWriteDep, caller: Caller, job_id: JobId, settings: SettingsDep) -> Response:
    """Resume a paused job. It goes back into the queue and continues where it was, to the same weights bit for bit."""
    with write.transaction() as session:
        return _respond(write, session, actions.resume_job(session, caller.project, job_id), settings)


@router.post(
    "/{job_id}/retry",
    status_code=202,
    summary="Retry a job",
    response_model=JobView,
    responses={
        **BODY_PROBLEMS,
        **replayable_response(202, location=True),
        **problem_responses(JobIsLive, JobHasSucceeded, BranchPointDeleted, *_DESCENDANT_ERRORS),
    },
)
def retry_job(
    write: PlannedWriteDep,
    caller: Caller,
    job_id: JobId,
    database: DatabaseDep,
    settings: SettingsDep,
    checker: EncodingCheckerDep,
    request: Request,
    body: RetryRequest | None = None,
) -> Response:
    """Create a job with the specification of an ended one, whose address is `Location`. It begins at the newest
    checkpoint, the end of a stage, or the start, and keeps the name, the labels and the priority of the ended job
    unless the body names others. One that has succeeded is retried from the start or an earlier stage alone.
    """
    body = body or RetryRequest()
    with database.transaction(write=False) as session:
        plan = lineage.plan_retry(
            session, settings, project=caller.project, job_id=job_id, start=RetryStart(body.start, body.stage)
        )
    plan = lineage.check_data(checker, plan)
    with write.transaction() as session:
        job = lineage.create_descendant(session, settings, plan, body.given_options)
        location = location_of(request, "get_job", job_id=job.id)
        return write.respond(present_job(session, job, settings), status=202, location=location)


@router.post(
    "/{job_id}/branch",
    status_code=201,
    summary="Branch off a job",
    response_model=JobView,
    responses={
        **BODY_PROBLEMS,
        **replayable_response(201, location=True),
        **problem_responses(*_DESCENDANT_ERRORS),
    },
)
def branch_job(
    write: PlannedWriteDep,
    caller: Caller,
    job_id: JobId,
    database: DatabaseDep,
    settings: SettingsDep,
    checker: EncodingCheckerDep,
    request: Request,
    body: BranchRequest,
) -> Response:
    """Create a job that continues another from the end of a stage, with other temperatures, another method or another
    teacher. Ranking and earlier stages are not repeated. The branch keeps the name, the labels and the priority of its
    parent unless the body names others.
    """
    with database.transaction(write=False) as session:
        plan = lineage.plan_branch(
            session,
            settings,
            project=caller.project,
            job_id=job_id,
            stage=body.stage,
            changes=body.changes,
            pointer_prefix="/changes",
        )
    plan = lineage.check_data(checker, plan)
    with write.transaction() as session:
        job = lineage.create_descendant(session, settings, plan, body.given_options)
        location = location_of(request, "get_job", job_id=job.id)
        return write.respond(present_job(session, job, settings), status=201, location=location)


@router.patch(
    "/{job_id}",
    summary="Change a job",
    responses={**BODY_PROBLEMS, **problem_responses(JobNotFound, Conflict, Unprocessable)},
)
def update_job(session: WriteSession, caller: Caller, job_id: JobId, settings: SettingsDep, body: JobUpdate) -> JobView:
    """Change the name, the labels, the priority or the retention of a job; fields that are not named stay. The priority
    counts while the job waits.
    """
    job = actions.update_job(session, caller.project, job_id, body.changes)
    return present_job(session, job, settings)


@router.delete(
    "/{job_id}",
    status_code=204,
    summary="Delete a job",
    responses=problem_responses(JobNotFound, JobIsLive, JobIsNeeded),
)
def delete_job(session: WriteSession, caller: Caller, job_id: JobId) -> None:
    """Delete an ended job with its history, results and checkpoints. The files are deleted soon after."""
    write_messages_about(session, job_id)
    actions.delete_job(session, caller.project, job_id)


def _respond(write: IdempotentWrite, session: Session, result: ActionResult, settings: Settings) -> Response:
    view = present_job(session, result.job, settings)
    return write.respond(view, status=202 if result.changed else 200)
