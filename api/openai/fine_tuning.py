"""Fine-tuning jobs as OpenAI's API has them."""

import re
from dataclasses import replace
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session

from api.auth import Caller
from api.dependencies import DatabaseDep, EncodingCheckerDep, SettingsDep
from api.idempotency.writes import IdempotentWriteDep
from api.openai.error_shape import PREFIX
from api.openai.job_mapping import FineTuningJobCreate, MappedJob, map_job
from api.openai.retried_creates import CreateOnceDep
from api.openai.schemas import (
    FineTuningJob,
    FineTuningJobCheckpoint,
    FineTuningJobEvent,
    ListPage,
    event_number,
    present_checkpoint,
    present_event,
    present_job,
)
from api.pagination import After
from api.path_params import JobId
from api.sessions import HeavyReadSession, ReadSession
from api.strict_json import StrictJsonRoute
from domain.checkpoints.repository import list_checkpoints, list_students
from domain.errors import ApiError, Unprocessable
from domain.jobs import actions, planning, repository, submission
from domain.jobs.models import Job
from pocl.errors import FieldError

router = APIRouter(prefix="/fine_tuning/jobs", include_in_schema=False, route_class=StrictJsonRoute)

_METADATA: Final = re.compile(r"metadata\[(.{1,64})\]")
_LISTED_KINDS: Final = ("stage", "best", "final")

PageLimit = Annotated[int, Query(ge=1, le=100)]
AfterEvent = Annotated[str | None, Query(min_length=1, max_length=128)]


class JobRefused(Unprocessable):
    """The job cannot be made as the body has it."""

    def __init__(self, error: Unprocessable, mapped: MappedJob) -> None:
        errors = [replace(each, pointer=_pointer(each, mapped)) for each in error.field_errors]
        super().__init__(error.detail, field_errors=errors)
        self.code = error.code


@router.post("")
def create_fine_tuning_job(
    body: FineTuningJobCreate,
    write: CreateOnceDep,
    caller: Caller,
    database: DatabaseDep,
    settings: SettingsDep,
    checker: EncodingCheckerDep,
) -> Response:
    """Queue a job. What the package sends again makes one job."""
    mapped = map_job(body)
    try:
        with database.transaction(write=False) as session:
            plan = planning.plan_job(session, settings, mapped.spec, project=caller.project)
        planned = submission.Submission(planning.check_data(checker, plan), mapped.options)
        with write.transaction() as session:
            (outcome,) = submission.create_jobs(session, settings, [planned], project=caller.project)
            if isinstance(outcome, ApiError):
                raise outcome
            job = outcome.job
            return write.respond(present_job(job, []), status=200, location=f"{PREFIX}/fine_tuning/jobs/{job.id}")
    except Unprocessable as error:
        raise JobRefused(error, mapped) from error


@router.get("")
def list_fine_tuning_jobs(
    session: HeavyReadSession, caller: Caller, request: Request, limit: PageLimit = 20, after: After = None
) -> ListPage[FineTuningJob]:
    """The jobs, newest first; `metadata[key]=value` filters them."""
    labels = {}
    for name, value in request.query_params.multi_items():
        if name in ("limit", "after"):
            continue
        filtered = _METADATA.fullmatch(name)
        if filtered is None:
            detail = "Jobs are filtered by `metadata[key]=value`, and paged by `limit` and `after`."
            raise Unprocessable(field_errors=[FieldError(f"/query/{name[:64]}", "unknown", detail)])
        labels[filtered[1]] = value
    page = repository.list_jobs(session, caller.project, limit=limit, after=after, labels=labels)
    ids = [row.id for row in page.rows]
    jobs, students = repository.get_jobs(session, ids), list_students(session, ids)
    shown = [present_job(jobs[job_id], students[job_id]) for job_id in ids if job_id in jobs]
    return ListPage.of(shown, [job.id for job in shown], has_more=page.has_more)


@router.get("/{job_id}")
def retrieve_fine_tuning_job(session: ReadSession, caller: Caller, job_id: JobId) -> FineTuningJob:
    """One job."""
    return _present(session, repository.get_job(session, caller.project, job_id))


@router.post("/{job_id}/cancel")
def cancel_fine_tuning_job(write: IdempotentWriteDep, caller: Caller, job_id: JobId) -> Response:
    """Cancel a job."""
    with write.transaction() as session:
        job = actions.cancel_job(session, caller.project, job_id).job
        return write.respond(_present(session, job), status=200)


@router.post("/{job_id}/pause")
def pause_fine_tuning_job(write: IdempotentWriteDep, caller: Caller, job_id: JobId) -> Response:
    """Pause a job."""
    with write.transaction() as session:
        job = actions.pause_job(session, caller.project, job_id, "now").job
        return write.respond(_present(session, job), status=200)


@router.post("/{job_id}/resume")
def resume_fine_tuning_job(write: IdempotentWriteDep, caller: Caller, job_id: JobId) -> Response:
    """Resume a paused job."""
    with write.transaction() as session:
        job = actions.resume_job(session, caller.project, job_id).job
        return write.respond(_present(session, job), status=200)


@router.get("/{job_id}/events")
def list_fine_tuning_events(
    session: HeavyReadSession, caller: Caller, job_id: JobId, limit: PageLimit = 20, after: AfterEvent = None
) -> ListPage[FineTuningJobEvent]:
    """The events of a job, newest first."""
    job = repository.get_job(session, caller.project, job_id)
    before = None
    if after is not None:
        before = event_number(job.id, after)
        if before is None:
            detail = "It is the id of no event of this job."
            raise Unprocessable(field_errors=[FieldError("/query/after", "unknown", detail)])
    page = repository.list_latest_events(session, job.id, before=before, limit=limit)
    shown = [present_event(row) for row in page.rows]
    return ListPage.of(shown, [event.id for event in shown], has_more=page.has_more)


@router.get("/{job_id}/checkpoints")
def list_fine_tuning_checkpoints(
    session: ReadSession, caller: Caller, job_id: JobId, limit: PageLimit = 10, after: After = None
) -> ListPage[FineTuningJobCheckpoint]:
    """The checkpoints of a job that are students, newest first."""
    job = repository.get_job(session, caller.project, job_id)
    page = list_checkpoints(session, caller.project, job_id=job.id, kinds=_LISTED_KINDS, limit=limit, after=after)
    evaluations = repository.list_evaluations(session, job.id)
    shown = [present_checkpoint(row, evaluations) for row in page.rows]
    return ListPage.of(shown, [row.id for row in page.rows], has_more=page.has_more)


def _present(session: Session, job: Job) -> FineTuningJob:
    return present_job(job, list_students(session, [job.id])[job.id])


def _pointer(error: FieldError, mapped: MappedJob) -> str:
    return mapped.pointer_in_body(error.pointer)
