"""Workers over HTTP: their liveness, their jobs, and draining."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from api.auth import Caller, ServiceAdminCaller, ServiceAdminRequired
from api.dependencies import SettingsDep
from api.idempotency.keys import KEY_ERRORS
from api.idempotency.writes import IdempotentWriteDep, replayable_response
from api.pagination import Limit, Page, Resource
from api.problems import COMMON_PROBLEMS, problem_responses
from api.sessions import ReadSession
from api.strict_json import StrictJsonRoute
from domain.db import db_now
from domain.errors import BodyTooLarge, JsonInvalid, Unprocessable, UnsupportedMediaType
from domain.jobs.models import Job
from domain.jobs.states import HELD
from domain.settings import Settings
from domain.workers import repository
from domain.workers.models import DrainMode, Worker, WorkerState
from domain.workers.repository import WorkerNotFound, worker_state

router = APIRouter(prefix="/workers", tags=["workers"], responses=COMMON_PROBLEMS, route_class=StrictJsonRoute)

_NAME = r"^[A-Za-z0-9._@-]{1,200}$"
WorkerName = Annotated[str, Path(pattern=_NAME, description="The name of a worker, for instance `gpu-box-1234`.")]
AfterName = Annotated[
    str | None,
    Query(pattern=_NAME, description="The name after whose worker the page begins: `last_id` of the previous page."),
]


class DeviceView(Resource):
    """A device that a worker computes on."""

    kind: Literal["cpu", "cuda"]
    """The kind of the device."""
    name: str
    """The name of the device, as its driver or operating system has it."""
    memory_bytes: int | None
    """The memory of the device in bytes; null where it is not known."""
    uuid: str | None = None
    """The UUID of a GPU or of a MIG instance, as its driver lists it; null for a CPU."""


class QuarantineView(Resource):
    """Why a worker claims nothing until a check of itself succeeds."""

    reason: str
    """What is wrong with the worker, in one sentence."""
    since: datetime
    """When the worker was quarantined."""
    checks_at: datetime
    """When it checks itself again."""


class WorkerView(Resource):
    """A worker."""

    id: str
    """The name of the worker; a worker that starts again has another."""
    object: Literal["worker"] = "worker"
    """The kind of the resource."""
    state: WorkerState
    """A `draining` worker still holds a job, a `drained` one holds none; a `quarantined` one claims none
    because it found itself sick, or because attempt after attempt failed on it; `lost` means that the worker has been
    silent for longer than a lease lasts."""
    quarantine: QuarantineView | None
    """Why the worker is quarantined; null unless it is."""
    devices: list[DeviceView]
    """The devices that the worker computes on."""
    job: str | None
    """The job that the worker holds; null if it holds none, or one of another project."""
    version: str | None
    """The version of the service that the worker runs; null for one that does not tell."""
    generation: int | None
    """The generation of that version: workers of the API's own and of the one before work with it (`/version`)."""
    started_at: datetime
    """When the worker registered."""
    seen_at: datetime
    """When the worker last showed its liveness."""


class WorkerPage(Page[WorkerView, str]):
    """Workers, by name."""


class DrainRequest(BaseModel):
    """How a worker is to be drained."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        frozen=True,
        json_schema_extra={"examples": [{"how": "release"}]},
    )

    how: DrainMode | None = "finish"
    """`finish` lets the worker end its job; `release` makes it save the job and give it back; null ends the draining,
    so that the worker takes jobs again; one that is quarantined checks itself at once, and takes jobs if it is well."""


@router.get("", summary="List the workers")
def list_workers(
    session: ReadSession, caller: Caller, settings: SettingsDep, limit: Limit = 20, after: AfterName = None
) -> WorkerPage:
    """Each worker with its devices and the job that it holds."""
    page = repository.list_workers(session, limit=limit, after=after)
    views = _present_workers(session, page.rows, caller.project, settings)
    return WorkerPage.from_rows(page, lambda row: views[row.name], lambda row: row.name)


@router.post(
    "/{name}/drain",
    summary="Drain a worker",
    response_model=WorkerView,
    responses={
        **replayable_response(200),
        **problem_responses(
            WorkerNotFound,
            ServiceAdminRequired,
            JsonInvalid,
            BodyTooLarge,
            UnsupportedMediaType,
            Unprocessable,
            *KEY_ERRORS,
        ),
    },
)
def drain_worker(
    write: IdempotentWriteDep,
    caller: ServiceAdminCaller,
    name: WorkerName,
    settings: SettingsDep,
    body: DrainRequest | None = None,
) -> Response:
    """The worker claims no more jobs, so that its machine can be taken away; repeating the request changes nothing.
    It needs an admin key of the project `default`, since all projects share the workers.
    """
    with write.transaction() as session:
        worker = repository.drain(session, name, (body or DrainRequest()).how)
        view = _present_workers(session, [worker], caller.project, settings)[name]
        return write.respond(view, status=200)


def _present_workers(
    session: Session, workers: Sequence[Worker], project: str, settings: Settings
) -> dict[str, WorkerView]:
    """Views by name; the jobs and the clock are read once for all of them."""
    held = sa.select(Job).where(Job.lease_owner.in_([worker.name for worker in workers]), Job.status.in_(HELD))
    jobs = {job.lease_owner: job for job in session.scalars(held)}
    lost_before = session.scalars(sa.select(db_now(-settings.lease_seconds))).one()
    return {worker.name: _present_worker(worker, jobs.get(worker.name), project, lost_before) for worker in workers}


def _present_worker(worker: Worker, job: Job | None, project: str, lost_before: datetime) -> WorkerView:
    return WorkerView(
        id=worker.name,
        state=worker_state(worker, holds_job=job is not None, lost_before=lost_before),
        quarantine=_quarantine(worker),
        devices=[DeviceView.model_validate(device) for device in worker.devices],
        job=job.id if job is not None and job.project == project else None,
        version=worker.version,
        generation=worker.generation,
        started_at=worker.started_at,
        seen_at=worker.seen_at,
    )


def _quarantine(worker: Worker) -> QuarantineView | None:
    if worker.quarantined_at is None or worker.checks_at is None:
        return None
    return QuarantineView(
        reason=worker.quarantine_reason or "", since=worker.quarantined_at, checks_at=worker.checks_at
    )
