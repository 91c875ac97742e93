"""The queue over HTTP."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import ConfigDict

from api.auth import Caller
from api.dependencies import SettingsDep
from api.pagination import Limit, Page, Resource
from api.problems import COMMON_PROBLEMS
from api.sessions import ReadSession
from domain.jobs.queue import QueuedJob, QueueReason, list_queued, queue_totals

router = APIRouter(prefix="/queue", tags=["queue"], responses=COMMON_PROBLEMS)

AfterPosition = Annotated[
    int,
    Query(ge=0, lt=2**31, description="The position after which the page begins: `last_id` of the previous page."),
]


class QueuedJobView(Resource):
    """A job that waits for a worker."""

    id: str
    """The id of the job."""
    object: Literal["queued_job"] = "queued_job"
    """The kind of the resource."""
    name: str | None
    """The name that people call the job."""
    priority: int
    """The priority of the job in the queue; the job of the highest priority is claimed first."""
    device: str
    """The kind of device that the job asks for: `cpu`, `cuda`, or `auto` for either."""
    memory_bytes: int | None
    """The device memory that the job needs, as planned; null where that is not known."""
    position: int
    """The position in the queue of all projects; the job at 1 is claimed next."""
    ahead: int
    """The number of jobs, of all projects, that are claimed before this one."""
    reason: QueueReason
    """Why the job waits, as in `queue` of the job. More reasons may be added."""
    until: datetime | None
    """When a job that is backing off may be claimed; null for any other reason."""
    starts_at: datetime | None
    """When the job is expected to start, estimated from running and recently ended jobs; null where too little is
    known."""
    created_at: datetime
    """When the job was submitted."""


class QueueTotalsView(Resource):
    """How busy the service is, all projects together."""

    queued: int
    """The number of jobs that wait for a worker."""
    running: int
    """The number of jobs that workers hold."""
    workers: int
    """The number of live workers that accept jobs."""
    workers_quarantined: int
    """The number of live workers that claim nothing until a check of themselves succeeds: `/v1/workers` says why."""


class QueuePage(Page[QueuedJobView, int]):
    """The queued jobs of the project, the next one first."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    first_id: int | None
    """The position of the first job of the page; null for an empty page."""
    last_id: int | None
    """The position of the last job of the page, which gets the next page as `after`; null for an empty page."""
    totals: QueueTotalsView | None = None
    """How busy the service is, all projects together."""


@router.get("", summary="Show the queue")
def show_queue(
    session: ReadSession, caller: Caller, settings: SettingsDep, limit: Limit = 20, after: AfterPosition = 0
) -> QueuePage:
    """The queued jobs of the project in the order in which they will be claimed: the position of each among those of
    all projects, why it waits, and when it is expected to start. Positions move while pages are read.
    """
    queued = list_queued(session, caller.project, limit=limit, after=after, worker_seconds=settings.lease_seconds)
    page = QueuePage.from_rows(queued, _present, lambda row: row.position.position)
    totals = queue_totals(session, worker_seconds=settings.lease_seconds)
    return page.model_copy(update={"totals": QueueTotalsView.model_validate(totals)})


def _present(queued: QueuedJob) -> QueuedJobView:
    job, position = queued.job, queued.position
    return QueuedJobView(
        id=job.id,
        name=job.name,
        priority=job.priority,
        device=job.device,
        memory_bytes=job.memory_bytes,
        position=position.position,
        ahead=position.ahead,
        reason=position.reason,
        until=position.until,
        starts_at=position.starts_at,
        created_at=job.created_at,
    )
