"""The push of a job's student to the Hub over HTTP: another try."""

from fastapi import APIRouter, Response

from api.auth import Caller
from api.dependencies import SettingsDep
from api.idempotency.keys import KEY_ERRORS
from api.idempotency.writes import IdempotentWriteDep, replayable_response
from api.jobs.presenter import present_job
from api.jobs.schemas import JobView
from api.path_params import JobId
from api.problems import COMMON_PROBLEMS, problem_responses
from api.strict_json import StrictJsonRoute
from domain.errors import JobNotFound, Unprocessable
from domain.jobs import publication_feed
from domain.jobs.publication_feed import AlreadyPublished, PublicationNotFound, PublishedCheckpointDeleted

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=COMMON_PROBLEMS, route_class=StrictJsonRoute)


@router.post(
    "/{job_id}/publication/retry",
    status_code=202,
    summary="Push the student of a job again",
    response_model=JobView,
    responses={
        200: {"model": JobView, "description": "It is under way already: nothing changed."},
        **replayable_response(202),
        **problem_responses(
            JobNotFound,
            PublicationNotFound,
            AlreadyPublished,
            PublishedCheckpointDeleted,
            Unprocessable,
            *KEY_ERRORS,
        ),
    },
)
def retry_publication(write: IdempotentWriteDep, caller: Caller, job_id: JobId, settings: SettingsDep) -> Response:
    """Try again to push a student to the Hub whose publication has failed, at once and for another day. `publication`
    of the job says what comes of it.
    """
    with write.transaction() as session:
        result = publication_feed.retry_publication(session, caller.project, job_id)
        view = present_job(session, result.job, settings)
        return write.respond(view, status=202 if result.changed else 200)
