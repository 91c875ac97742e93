"""The first page, with the jobs of the project, and the queue with the workers."""

from typing import Annotated, Final, Literal

from fastapi import APIRouter, Depends, Query, Request, Response

from api.auth import Caller
from api.dashboard.job_states import QUEUE_REASONS, STATE_GROUPS, WORKER_STATES
from api.dashboard.live_parts import ShownDigests, respond_with_parts
from api.dependencies import SettingsDep
from api.jobs.presenter import summarize_job
from api.queue.routes import show_queue
from api.request_checks import refuse_unknown_parameters
from api.sessions import ReadSession
from api.workers.routes import list_workers
from domain.jobs import repository
from domain.jobs.queue import queue_totals

router = APIRouter(include_in_schema=False, dependencies=[Depends(refuse_unknown_parameters)])

_PAGE: Final = 25
_QUEUE_PAGE: Final = 100
State = Literal["", "active", "queued", "paused", "succeeded", "failed", "cancelled"]
# A form sends its empty fields too.
Label = Annotated[str, Query(pattern=r"^(?:[^\x00-\x1f\x7f=]{1,63}=[^\x00-\x1f\x7f]{0,200})?$")]
After = Annotated[str, Query(pattern=r"^[0-9a-z_]{0,64}$")]


@router.get("/")
def show_jobs(
    request: Request,
    session: ReadSession,
    caller: Caller,
    settings: SettingsDep,
    state: State = "",
    label: Label = "",
    after: After = "",
    seen: ShownDigests = "",
) -> Response:
    """The jobs of the project, newest first."""
    key, _, value = label.partition("=")
    page = repository.list_jobs(
        session,
        caller.project,
        limit=_PAGE,
        after=after or None,
        statuses=STATE_GROUPS.get(state, ()),
        labels={key: value} if label else None,
    )
    rows = {row.id: row for row in repository.get_listed_jobs(session, [job.id for job in page.rows])}
    context = {
        "jobs": [summarize_job(rows[job.id]) for job in page.rows if job.id in rows],
        "has_more": page.has_more,
        "totals": queue_totals(session, worker_seconds=settings.lease_seconds),
        "state": state,
        "states": STATE_GROUPS,
        "label": label,
        "after": after,
    }
    return respond_with_parts(request, "jobs.html", ("job-totals", "job-list"), context, seen=seen)


@router.get("/ui/queue")
def show_queue_page(
    request: Request, session: ReadSession, caller: Caller, settings: SettingsDep, seen: ShownDigests = ""
) -> Response:
    """The jobs that wait, each with its reason, and the workers."""
    context = {
        "queue": show_queue(session, caller, settings, _QUEUE_PAGE, 0),
        "workers": list_workers(session, caller, settings, _QUEUE_PAGE, None),
        "reasons": QUEUE_REASONS,
        "worker_states": WORKER_STATES,
    }
    return respond_with_parts(request, "queue.html", ("queue-jobs", "queue-workers"), context, seen=seen)
