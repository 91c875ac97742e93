"""The page of a job: its state, stages, curves, answers, events, log and checkpoints."""

from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy.orm import Session

from api.auth import Caller
from api.dashboard.curves import present_curves
from api.dashboard.job_states import QUEUE_REASONS
from api.dashboard.live_parts import ShownDigests, respond_with_parts, unchanged
from api.dashboard.rendering import render
from api.dependencies import SettingsDep
from api.jobs.presenter import present_job
from api.jobs.routes import get_job_metrics, list_job_attempts, list_job_checkpoints, list_job_events, list_job_stages
from api.jobs.routes import show_job_report as serve_job_report
from api.path_params import JobId
from api.principal import Principal
from api.request_checks import refuse_unknown_parameters
from api.sessions import HeavyReadSession, ReadSession
from domain.checkpoints.repository import list_saved_stages
from domain.jobs import repository
from domain.jobs.engine_logs import next_log_chunks, tail_start
from domain.jobs.models import Job
from domain.jobs.states import ALLOWED_ACTIONS, TERMINAL
from domain.settings import Settings

router = APIRouter(prefix="/ui/jobs", include_in_schema=False, dependencies=[Depends(refuse_unknown_parameters)])

PARTS: Final = ("job-status", "job-stages", "job-scores", "job-actions", "job-checkpoints", "job-events")
_EVENTS: Final = 30
_CHECKPOINTS: Final = 50
_LOG_BYTES: Final = 16 * 1024
_POINTS: Final = 400
_SUBJECTS: Final = ("teacher", "initial", "stage", "best", "final")
"""What the table of scores has, in the order of its rows at one step."""


@router.get("/{job_id}")
def show_job(
    request: Request,
    session: HeavyReadSession,
    caller: Caller,
    settings: SettingsDep,
    job_id: JobId,
    seen: ShownDigests = "",
) -> Response:
    """The page, and to its script what of it has changed."""
    row = repository.get_job(session, caller.project, job_id)
    context = {
        **_context(session, caller, settings, row),
        "log": _log_tail(session, row),
        "address": str(request.base_url).rstrip("/"),
    }
    return respond_with_parts(request, "job.html", PARTS, context, seen=seen, is_over=row.status in TERMINAL)


@router.get("/{job_id}/publication")
def show_job_publication(
    request: Request, session: ReadSession, caller: Caller, settings: SettingsDep, job_id: JobId
) -> Response:
    """What has come of the push of the student to the Hub."""
    row = repository.get_job(session, caller.project, job_id)
    job = present_job(session, row, settings)
    return render(request, "job_publication.html", job=job, ended=row.status in TERMINAL)


@router.get("/{job_id}/curves")
def get_job_curves(session: HeavyReadSession, caller: Caller, job_id: JobId) -> dict[str, Any]:
    """What the charts of the page draw."""
    metrics = get_job_metrics(session, caller, job_id, ("loss", "cross_entropy", "divergence"), 0, None, _POINTS)
    return present_curves(metrics, list_job_stages(session, caller, job_id).data)


@router.get("/{job_id}/log")
def show_job_log(
    request: Request,
    session: HeavyReadSession,
    caller: Caller,
    job_id: JobId,
    attempt: Annotated[int, Query(ge=0, lt=2**31)],
    offset: Annotated[int, Query(ge=0, lt=2**60)],
) -> Response:
    """What the log has after a byte of an attempt."""
    row = repository.get_job(session, caller.project, job_id)
    log = _log_after(session, row, attempt, offset)
    if not log["text"] and not log["is_over"]:
        return unchanged()
    return render(request, "job_log_tail.html", job=row, log=log)


@router.get("/{job_id}/events")
def show_job_events(
    request: Request,
    session: HeavyReadSession,
    caller: Caller,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, lt=2**31)] = 0,
) -> Response:
    """The history of the job, oldest first."""
    row = repository.get_job(session, caller.project, job_id)
    return render(
        request,
        "job_history.html",
        job_id=row.id,
        name=row.name,
        events=list_job_events(session, caller, job_id, 100, after),
        attempts=list_job_attempts(session, caller, job_id, 100, 0),
        after=after,
    )


@router.get("/{job_id}/report")
def show_job_report(session: ReadSession, caller: Caller, job_id: JobId, request: Request) -> Response:
    """The report of the job, as the API serves it."""
    return serve_job_report(session, caller, job_id, request, request.app.state.store)


def _context(session: Session, caller: Principal, settings: Settings, row: Job) -> dict[str, Any]:
    job = present_job(session, row, settings)
    stages = list_job_stages(session, caller, row.id).data
    evaluations = repository.list_evaluations(session, row.id)
    checkpoints = list_job_checkpoints(session, caller, row.id, _CHECKPOINTS, None)
    after = max(0, row.event_seq - _EVENTS)
    events = list_job_events(session, caller, row.id, _EVENTS, after).data
    return {
        "job": job,
        "stages": stages,
        "evaluations": sorted(
            (each for each in evaluations if each.subject in _SUBJECTS),
            key=lambda each: (each.step, _SUBJECTS.index(each.subject)),
        ),
        # What a branch inherited has ended too, but its state is that of the other job.
        "saved_stages": list_saved_stages(session, row.id),
        # The newest `best` takes the place of the one before.
        "best_stage": next((each.stage for each in checkpoints.data if each.kind == "best"), None),
        "allowed": ALLOWED_ACTIONS[row.status],
        "ended": row.status in TERMINAL,
        "events": events[::-1],
        "checkpoints": checkpoints,
        "has_report": repository.get_artifact(session, row.id, "report") is not None,
        "reasons": QUEUE_REASONS,
    }


def _log_tail(session: Session, row: Job) -> dict[str, Any]:
    """The end of the log of the newest attempt."""
    attempt = repository.latest_attempt(session, row.id)
    if attempt is None:
        return {"text": "", "attempt": 0, "offset": 0, "is_over": row.status in TERMINAL}
    start = tail_start(session, attempt, _LOG_BYTES)
    return _log_after(session, row, attempt.number, start)


def _log_after(session: Session, row: Job, attempt: int, offset: int) -> dict[str, Any]:
    chunks = next_log_chunks(session, row.id, attempt=attempt, offset=offset)
    texts = []
    for each in chunks:
        if each.attempt != attempt:
            texts.append(f"\n--- attempt {each.attempt} ---\n")
        texts.append(each.chunk.content.decode("utf-8", "replace"))
        attempt, offset = each.attempt, each.chunk.end
    return {
        "text": "".join(texts),
        "attempt": attempt,
        "offset": offset,
        "is_over": not chunks and row.status in TERMINAL,
    }
