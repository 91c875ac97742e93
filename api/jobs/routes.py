"""Jobs over HTTP: submit, check, list, and what they bring about."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import StringConstraints
from sqlalchemy.orm import Session

from api.auth import Caller, Principal
from api.checkpoints.schemas import CheckpointPage, CheckpointView
from api.downloads import (
    ArtifactDamaged,
    FileNotInArtifact,
    RangeNotSatisfiable,
    download_responses,
    serve_file,
)
from api.idempotency.requests import KEY_ERRORS, IdempotentRequest, IdempotentRoute, replayable_response
from api.jobs.plan_schemas import PlanView
from api.jobs.presenter import SPEC_ERRORS, pointing_into, present_job
from api.jobs.requests import JobCreate
from api.jobs.schemas import (
    AttemptPage,
    AttemptView,
    EvaluationView,
    EventPage,
    EventView,
    JobPage,
    JobSummary,
    JobView,
    MetricsView,
    SeriesView,
    StageList,
    StageView,
)
from api.pagination import After, AfterNumber, Limit
from api.path_params import JobId
from api.problems import COMMON_PROBLEMS, problem_responses
from api.sessions import ReadSession, WriteSession
from domain.checkpoints.repository import list_checkpoints
from domain.errors import (
    BodyTooLarge,
    JobNotFound,
    JsonInvalid,
    NotFound,
    QuotaExceeded,
    Unprocessable,
    UnsupportedMediaType,
)
from domain.jobs import repository, submission
from domain.jobs.states import JobStatus

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=COMMON_PROBLEMS, route_class=IdempotentRoute)

_JOB_PROBLEMS = problem_responses(JobNotFound)
_BODY_PROBLEMS = problem_responses(JsonInvalid, BodyTooLarge, UnsupportedMediaType)
_SPEC_PROBLEMS = problem_responses(Unprocessable, *SPEC_ERRORS)

Statuses = Annotated[
    list[JobStatus],
    Query(default_factory=list, max_length=16, description="Only jobs in one of these states; may be repeated."),
]
Labels = Annotated[
    list[Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f=]{1,63}=[^\x00-\x1f\x7f]{0,200}$")]],
    Query(
        default_factory=list,
        max_length=16,
        description="Only jobs with this label, as `key=value`; repeated: with all of them.",
    ),
]
MetricNames = Annotated[
    list[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,32}$")]],
    Query(default_factory=list, max_length=20, description="Only these series, for instance `loss`; may be repeated."),
]
AttemptNumber = Annotated[
    int | None, Query(ge=1, lt=2**31, description="The log of this attempt; of the newest unless given.")
]


class AttemptNotFound(NotFound):
    """The job has no attempt of this number."""

    code = "attempt_not_found"


class ArtifactNotReady(NotFound):
    """The job has not made this yet: it comes as the job goes on."""

    code = "artifact_not_ready"


def _artifact(media_type: str) -> dict[int | str, dict[str, Any]]:
    return {
        **download_responses(media_type),
        **problem_responses(JobNotFound, ArtifactNotReady, FileNotInArtifact, RangeNotSatisfiable, ArtifactDamaged),
    }


@router.post(
    "",
    status_code=201,
    summary="Submit a job",
    responses={
        **replayable_response(201, location=True),
        **_BODY_PROBLEMS,
        **problem_responses(Unprocessable, *SPEC_ERRORS, *KEY_ERRORS, QuotaExceeded),
    },
)
def create_job(
    body: JobCreate,
    session: WriteSession,
    _once: IdempotentRequest,
    caller: Caller,
    request: Request,
    response: Response,
) -> JobView:
    """Queue a distillation job. Everything that can be checked is checked now: fields, data sets, models,
    vocabularies. The answer has the specification with every default named.
    """
    with pointing_into("spec"):
        job = submission.submit_job(
            request.app.state.database,
            request.app.state.settings,
            body.spec,
            project=caller.project,
            options=body.options,
            session=session,
        )
    response.headers["location"] = str(request.app.url_path_for("get_job", job_id=job.id))
    return present_job(session, job, request.app.state.settings)


@router.post("/validate", summary="Check a job without submitting it", responses={**_BODY_PROBLEMS, **_SPEC_PROBLEMS})
def validate_job(body: JobCreate, session: ReadSession, caller: Caller, request: Request) -> PlanView:
    """The dry run of a submission: the specification with every default named, the table of stages, what it costs in
    memory, disk and arithmetic, and warnings. Nothing is stored.
    """
    with pointing_into("spec"):
        return PlanView.of(submission.plan_job(session, request.app.state.settings, body.spec, project=caller.project))


@router.get("", summary="List jobs")
def list_jobs(
    session: ReadSession,
    caller: Caller,
    status: Statuses,
    label: Labels,
    limit: Limit = 20,
    after: After = None,
) -> JobPage:
    """The project's jobs, newest first. A page never repeats or misses a job because new ones arrive."""
    found = repository.list_jobs(
        session,
        caller.project,
        limit=limit,
        after=after,
        statuses=status,
        labels={key: value for key, _, value in (each.partition("=") for each in label)},
    )
    return JobPage.of(found, JobSummary.of, lambda row: row.id)


@router.get("/{job_id}/stages", summary="List the stages of a job", responses=_JOB_PROBLEMS)
def list_job_stages(session: ReadSession, caller: Caller, job_id: JobId) -> StageList:
    """The curriculum: samples, temperature, KD weight and steps of each stage, how far it is, and its scores."""
    job = repository.get_job(session, caller.project, job_id)
    return StageList(data=[StageView.of(row) for row in repository.list_stages(session, job.id)])


@router.get("/{job_id}/events", summary="List the events of a job", responses=_JOB_PROBLEMS)
def list_job_events(
    session: ReadSession, caller: Caller, job_id: JobId, limit: Limit = 100, after: AfterNumber = 0
) -> EventPage:
    """The job's history, oldest first; `after` is the last number that the client has."""
    job = repository.get_job(session, caller.project, job_id)
    found = repository.list_events(session, job.id, after=after, limit=limit)
    return EventPage.of(found, EventView.of, lambda row: row.seq)


@router.get("/{job_id}/metrics", summary="Get the metrics of a job", responses=_JOB_PROBLEMS)
def get_job_metrics(
    session: ReadSession,
    caller: Caller,
    job_id: JobId,
    names: MetricNames,
    from_step: Annotated[int, Query(ge=0, lt=2**31, description="The first step, inclusive.")] = 0,
    to_step: Annotated[int | None, Query(ge=0, lt=2**31, description="The last step, inclusive.")] = None,
    resolution: Annotated[int, Query(ge=2, le=5000, description="About this many points of each series.")] = 500,
) -> MetricsView:
    """Loss, temperature, learning rate and the like over the steps, thinned out evenly, and all evaluations."""
    job = repository.get_job(session, caller.project, job_id)
    series = repository.metric_series(
        session, job.id, points=resolution, names=names, from_step=from_step, to_step=to_step
    )
    return MetricsView(
        series=[SeriesView.of(each) for each in series],
        evaluations=[EvaluationView.of(row) for row in repository.list_evaluations(session, job.id)],
    )


@router.get("/{job_id}/attempts", summary="List the attempts of a job", responses=_JOB_PROBLEMS)
def list_job_attempts(
    session: ReadSession, caller: Caller, job_id: JobId, limit: Limit = 20, after: AfterNumber = 0
) -> AttemptPage:
    """Which workers held the job, oldest first, and how each attempt ended."""
    job = repository.get_job(session, caller.project, job_id)
    found = repository.list_attempts(session, job.id, limit=limit, after=after)
    return AttemptPage.of(found, AttemptView.of, lambda row: row.number)


@router.get("/{job_id}/checkpoints", summary="List the checkpoints of a job", responses=_JOB_PROBLEMS)
def list_job_checkpoints(
    session: ReadSession, caller: Caller, job_id: JobId, limit: Limit = 20, after: After = None
) -> CheckpointPage:
    """What the job saved, newest first: training states, the end of each stage, the best and the final student."""
    job = repository.get_job(session, caller.project, job_id)
    found = list_checkpoints(session, caller.project, job_id=job.id, limit=limit, after=after)
    return CheckpointPage.of(found, CheckpointView.of, lambda row: row.id)


@router.get(
    "/{job_id}/logs",
    summary="Read the log of a job",
    response_class=PlainTextResponse,
    responses={
        200: {"description": "The end of what the engine wrote."},
        **problem_responses(JobNotFound, AttemptNotFound),
    },
)
def get_job_logs(
    session: ReadSession,
    caller: Caller,
    job_id: JobId,
    attempt: Annotated[
        int | None, Query(ge=1, lt=2**31, description="Of this attempt; of the newest unless given.")
    ] = None,
) -> str:
    """The end of an attempt's log as text; empty before the first attempt."""
    job = repository.get_job(session, caller.project, job_id)
    if attempt is None:
        newest = repository.latest_attempt(session, job.id)
        return newest.log_tail if newest is not None else ""
    found = repository.get_attempt(session, job.id, attempt)
    if found is None:
        raise AttemptNotFound
    return found.log_tail


@router.get(
    "/{job_id}/ranking",
    summary="Download the ranking of a job",
    response_class=Response,
    responses=_artifact("application/jsonl"),
)
def download_job_ranking(session: ReadSession, caller: Caller, job_id: JobId, request: Request) -> Response:
    """The training samples from easy to hard, one JSON object a line, with their ranks and scores."""
    return _serve_artifact(session, caller, job_id, "ranking", request)


@router.get(
    "/{job_id}/result",
    summary="Download the result of a job",
    response_class=Response,
    responses=_artifact("application/json"),
)
def download_job_result(session: ReadSession, caller: Caller, job_id: JobId, request: Request) -> Response:
    """The scores of teacher, initial student, each stage and the final student."""
    return _serve_artifact(session, caller, job_id, "result", request)


@router.get(
    "/{job_id}/report", summary="Show the report of a job", response_class=Response, responses=_artifact("text/html")
)
def show_job_report(session: ReadSession, caller: Caller, job_id: JobId, request: Request) -> Response:
    """The result as a page with plots."""
    return _serve_artifact(session, caller, job_id, "report", request)


def _serve_artifact(session: Session, caller: Principal, job_id: str, kind: str, request: Request) -> Response:
    job = repository.get_job(session, caller.project, job_id)
    artifact = repository.get_artifact(session, job.id, kind)
    if artifact is None:
        raise ArtifactNotReady
    return serve_file(request.app.state.store, artifact.store_key, artifact.sha256, artifact.size_bytes, request)
