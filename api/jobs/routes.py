"""Jobs over HTTP: submit, list, and the results of a job."""

from collections.abc import Mapping
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request, Response
from pydantic import StringConstraints

from api.auth import Caller
from api.byte_ranges import RangeNotSatisfiable
from api.checkpoints.schemas import CheckpointPage, checkpoint_presenter
from api.client_shares import TRANSFER_ERRORS
from api.dependencies import DatabaseDep, EncodingCheckerDep, GroupCommitDep, SettingsDep, StoreDep
from api.downloads import (
    ArtifactDamaged,
    ArtifactFileNotFound,
    download_responses,
    serve_file,
)
from api.idempotency.keys import KEY_ERRORS
from api.idempotency.writes import PlannedWriteDep, replayable_response
from api.jobs.presenter import present_new_job
from api.jobs.requests import JobCreate
from api.jobs.schemas import (
    AttemptPage,
    AttemptView,
    EvaluationView,
    EventPage,
    EventView,
    JobPage,
    JobView,
    MetricsView,
    SeriesView,
    StageList,
    StageView,
)
from api.jobs.summaries import SummaryCacheDep
from api.pagination import After, AfterNumber, Limit
from api.path_params import JobId
from api.prefix import location_of
from api.problems import BODY_PROBLEMS, COMMON_PROBLEMS, STORE_ERRORS, problem_responses
from api.sessions import HeavyReadSession, ReadSession, transaction_slot
from api.strict_json import StrictJsonRoute
from domain.artifacts import ArtifactStore
from domain.checkpoints.repository import list_checkpoints
from domain.errors import SPEC_ERRORS, ApiError, JobNotFound, NotFound, QuotaExceeded, Unprocessable
from domain.jobs import planning, repository, submission
from domain.jobs.models import Job, JobArtifact
from domain.jobs.queue import QueuedJob
from domain.jobs.states import JobStatus
from pocl.spec import DistillationSpec

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=COMMON_PROBLEMS, route_class=StrictJsonRoute)

_JOB_PROBLEMS = problem_responses(JobNotFound)

# Tuples have an immutable default. A `default_factory` would be inspected with every request.
Statuses = Annotated[
    tuple[JobStatus, ...],
    Query(max_length=16, description="The states of the jobs to list, any of them; may be repeated."),
]
Labels = Annotated[
    tuple[Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f=]{1,63}=[^\x00-\x1f\x7f]{0,200}$")], ...],
    Query(
        max_length=16,
        description="A label of the jobs to list, as `key=value`; where it is repeated, a job has all of them.",
    ),
]
MetricNames = Annotated[
    tuple[Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,32}$")], ...],
    Query(
        max_length=20,
        description="The metrics to return, for instance `loss`; all unless given; may be repeated.",
    ),
]


class ArtifactNotReady(NotFound):
    """The job has not produced this yet: ask again while the job goes on."""

    code = "artifact_not_ready"


class ArtifactNotProduced(NotFound):
    """The job has ended without producing this: `end_reason` of the job says why."""

    code = "artifact_not_produced"


class ArtifactNotPlanned(NotFound):
    """A job with this specification does not produce this."""

    code = "artifact_not_planned"


def _artifact_responses(media_type: str) -> dict[int | str, dict[str, Any]]:
    return {
        **download_responses(media_type),
        **problem_responses(
            JobNotFound,
            ArtifactNotReady,
            ArtifactNotProduced,
            ArtifactNotPlanned,
            ArtifactFileNotFound,
            RangeNotSatisfiable,
            ArtifactDamaged,
            *TRANSFER_ERRORS,
            *STORE_ERRORS,
        ),
    }


@router.post(
    "",
    status_code=201,
    summary="Submit a job",
    response_model=JobView,
    responses={
        **replayable_response(201, location=True),
        **BODY_PROBLEMS,
        **problem_responses(Unprocessable, *SPEC_ERRORS, *KEY_ERRORS, QuotaExceeded),
    },
)
def create_job(
    body: JobCreate,
    write: PlannedWriteDep,
    caller: Caller,
    database: DatabaseDep,
    settings: SettingsDep,
    checker: EncodingCheckerDep,
    group_commit: GroupCommitDep,
    request: Request,
) -> Response:
    """Queue a distillation job. Everything that can be checked is checked now: fields, data sets, models,
    vocabularies, and templates on the samples. The response has the specification with every default named.
    """
    with database.transaction(write=False) as session:
        plan = planning.plan_job(session, settings, body.spec, project=caller.project, pointer_prefix="/spec")
    planned = submission.Submission(planning.check_data(checker, plan), body.options)

    def respond(queued: QueuedJob) -> Response:
        location = location_of(request, "get_job", job_id=queued.job.id)
        return write.respond(present_new_job(queued), status=201, location=location)

    if not write.is_keyed:
        return respond(group_commit.submit(settings, caller.project, planned))
    # The response is stored by the same transaction.
    with write.transaction() as session:
        (outcome,) = submission.create_jobs(session, settings, [planned], project=caller.project)
        if isinstance(outcome, ApiError):
            raise outcome
        return respond(outcome)


@router.get("", summary="List jobs", response_model=JobPage)
async def list_jobs(
    caller: Caller,
    database: DatabaseDep,
    summaries: SummaryCacheDep,
    status: Statuses = (),
    label: Labels = (),
    limit: Limit = 20,
    after: After = None,
) -> Response:
    """The project's jobs, newest first. A page never repeats or misses a job because new ones arrive."""
    labels = {key: value for key, _, value in (each.partition("=") for each in label)}

    def read() -> bytes:
        with database.transaction(write=False) as session:
            page = repository.list_jobs(
                session, caller.project, limit=limit, after=after, statuses=status, labels=labels
            )
            return summaries.render_page(session, page)

    # One way to a thread and back: by a dependency on a session there were three.
    async with transaction_slot():
        content = await run_sync(read)
    return Response(content, media_type="application/json")


@router.get("/{job_id}/stages", summary="List the stages of a job", responses=_JOB_PROBLEMS)
def list_job_stages(session: ReadSession, caller: Caller, job_id: JobId) -> StageList:
    """The stages of the curriculum: samples, temperature, KD weight and steps of each, its state, and its scores."""
    job = repository.get_job(session, caller.project, job_id)
    return StageList(data=[StageView.model_validate(row) for row in repository.list_stages(session, job.id)])


@router.get("/{job_id}/events", summary="List the events of a job", responses=_JOB_PROBLEMS)
def list_job_events(
    session: HeavyReadSession, caller: Caller, job_id: JobId, limit: Limit = 100, after: AfterNumber = 0
) -> EventPage:
    """The history of the job, oldest first."""
    job = repository.get_job(session, caller.project, job_id)
    page = repository.list_events(session, job.id, after=after, limit=limit)
    return EventPage.from_rows(page, EventView.model_validate, lambda row: row.seq)


@router.get("/{job_id}/metrics", summary="Get the metrics of a job", responses=_JOB_PROBLEMS)
def get_job_metrics(
    session: HeavyReadSession,
    caller: Caller,
    job_id: JobId,
    names: MetricNames = (),
    from_step: Annotated[int, Query(ge=0, lt=2**31, description="The first optimiser step, inclusive.")] = 0,
    to_step: Annotated[int | None, Query(ge=0, lt=2**31, description="The last optimiser step, inclusive.")] = None,
    resolution: Annotated[
        int, Query(ge=2, le=5000, description="About how many points of each metric to return.")
    ] = 500,
) -> MetricsView:
    """Loss, temperature, learning rate and the like over the steps, thinned out evenly, and all evaluations."""
    job = repository.get_job(session, caller.project, job_id)
    series = repository.metric_series(
        session, job.id, points=resolution, names=names, from_step=from_step, to_step=to_step
    )
    return MetricsView(
        series=[SeriesView.model_validate(each) for each in series],
        evaluations=[EvaluationView.model_validate(row) for row in repository.list_evaluations(session, job.id)],
    )


@router.get("/{job_id}/attempts", summary="List the attempts of a job", responses=_JOB_PROBLEMS)
def list_job_attempts(
    session: ReadSession, caller: Caller, job_id: JobId, limit: Limit = 20, after: AfterNumber = 0
) -> AttemptPage:
    """The attempts of the job, oldest first: the worker of each, and how it ended."""
    job = repository.get_job(session, caller.project, job_id)
    page = repository.list_attempts(session, job.id, limit=limit, after=after)
    return AttemptPage.from_rows(page, AttemptView.model_validate, lambda row: row.number)


@router.get("/{job_id}/checkpoints", summary="List the checkpoints of a job", responses=_JOB_PROBLEMS)
def list_job_checkpoints(
    session: ReadSession, caller: Caller, job_id: JobId, limit: Limit = 20, after: After = None
) -> CheckpointPage:
    """The checkpoints of the job, newest first: training states, ends of stages, the best and the final student."""
    job = repository.get_job(session, caller.project, job_id)
    page = list_checkpoints(session, caller.project, job_id=job.id, limit=limit, after=after)
    present = checkpoint_presenter(session, caller.project, page.rows)
    return CheckpointPage.from_rows(page, present, lambda row: row.id)


@router.get(
    "/{job_id}/ranking",
    summary="Download the ranking of a job",
    response_class=Response,
    responses=_artifact_responses("application/jsonl"),
)
def download_job_ranking(
    session: ReadSession, caller: Caller, job_id: JobId, request: Request, store: StoreDep
) -> Response:
    """The training samples from easy to hard, one JSON object a line, with their ranks and scores. A retry or branch
    that did not rank has the ranking of its nearest ancestor.
    """
    job = repository.get_job(session, caller.project, job_id)
    ranking = None if "ranking" in _never_made(job) else repository.find_ranking(session, job)
    return _serve_artifact(job, ranking, "ranking", request, store)


@router.get(
    "/{job_id}/answers",
    summary="Download the answers of a job",
    response_class=Response,
    responses=_artifact_responses("application/jsonl"),
)
def download_job_answers(
    session: ReadSession, caller: Caller, job_id: JobId, request: Request, store: StoreDep
) -> Response:
    """The greedy answers of teacher, initial student and the student after each stage to the samples that they were
    scored on, one JSON object a line, with its scores; of samples without a reference the answers alone.
    """
    job = repository.get_job(session, caller.project, job_id)
    return _serve_artifact(job, repository.get_artifact(session, job.id, "answers"), "answers", request, store)


@router.get(
    "/{job_id}/result",
    summary="Download the result of a job",
    response_class=Response,
    responses=_artifact_responses("application/json"),
)
def download_job_result(
    session: ReadSession, caller: Caller, job_id: JobId, request: Request, store: StoreDep
) -> Response:
    """The scores of teacher, initial student, each stage and the final student."""
    job = repository.get_job(session, caller.project, job_id)
    return _serve_artifact(job, repository.get_artifact(session, job.id, "result"), "result", request, store)


@router.get(
    "/{job_id}/report",
    summary="Show the report of a job",
    response_class=Response,
    responses=_artifact_responses("text/html"),
)
def show_job_report(session: ReadSession, caller: Caller, job_id: JobId, request: Request, store: StoreDep) -> Response:
    """The result of the job as an HTML page with plots."""
    job = repository.get_job(session, caller.project, job_id)
    return _serve_artifact(job, repository.get_artifact(session, job.id, "report"), "report", request, store)


def _serve_artifact(
    job: Job, artifact: JobArtifact | None, kind: str, request: Request, store: ArtifactStore
) -> Response:
    if artifact is None:
        if kind in (never := _never_made(job)):
            raise ArtifactNotPlanned(never[kind])
        raise ArtifactNotProduced if job.ended else ArtifactNotReady
    return serve_file(store, artifact.store_key, artifact.sha256, artifact.size_bytes, request)


def _never_made(job: Job) -> Mapping[str, str]:
    return DistillationSpec.model_validate(job.spec).artifacts_never_made
