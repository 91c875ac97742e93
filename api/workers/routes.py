"""Workers over HTTP: who is there, what each does, and letting one end in peace."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal, Self

import sqlalchemy as sa
from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from api.auth import Caller
from api.idempotency.requests import KEY_ERRORS, IdempotentRequest, IdempotentRoute, replayable_response
from api.pagination import Limit, Page, Resource
from api.problems import COMMON_PROBLEMS, problem_responses
from api.sessions import ReadSession, WriteSession
from domain.db import db_now
from domain.errors import BodyTooLarge, JsonInvalid, Unprocessable, UnsupportedMediaType
from domain.jobs.models import Job
from domain.jobs.states import HELD
from domain.settings import Settings
from domain.workers import repository
from domain.workers.models import DrainMode, Worker
from domain.workers.repository import WorkerNotFound

router = APIRouter(prefix="/workers", tags=["workers"], responses=COMMON_PROBLEMS, route_class=IdempotentRoute)

_NAME = r"^[A-Za-z0-9._@-]{1,200}$"
WorkerName = Annotated[str, Path(pattern=_NAME, description="For instance `gpu-box-1234`.")]
AfterName = Annotated[str | None, Query(pattern=_NAME, description="Only what comes after this name in the list.")]


class DeviceView(Resource):
    """One thing that a worker computes on."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int | None


class WorkerView(Resource):
    """A worker."""

    id: str
    """Its name; a worker that starts again has another."""
    object: Literal["worker"] = "worker"
    state: Literal["idle", "busy", "draining", "drained", "lost"]
    """`draining` has a job yet, `drained` has none; `lost` was not heard of for longer than a lease lasts."""
    devices: list[DeviceView]
    job: str | None
    """The job that it holds, if that is one of the project."""
    started_at: datetime
    seen_at: datetime

    @classmethod
    def of(cls, worker: Worker, job: Job | None, *, project: str, lost: bool) -> Self:
        return cls(
            id=worker.name,
            state=_state(worker, job, lost=lost),
            devices=[DeviceView(**device) for device in worker.devices],
            job=job.id if job is not None and job.project == project else None,
            started_at=worker.started_at,
            seen_at=worker.seen_at,
        )


class WorkerPage(Page[WorkerView, str]):
    """Workers, by name."""


class DrainRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    how: DrainMode | None = "finish"
    """`finish` ends the job that it has; `release` saves that and gives it back; null lets it take jobs again."""


@router.get("", summary="List the workers")
def list_workers(
    session: ReadSession, caller: Caller, request: Request, limit: Limit = 20, after: AfterName = None
) -> WorkerPage:
    """Each worker with its devices and the job that it holds."""
    found = repository.list_workers(session, limit=limit, after=after)
    views = _shown(session, found.rows, caller.project, request.app.state.settings)
    return WorkerPage.of(found, lambda row: views[row.name], lambda row: row.name)


@router.post(
    "/{name}/drain",
    summary="Drain a worker",
    responses={
        **replayable_response(200),
        **problem_responses(
            WorkerNotFound, JsonInvalid, BodyTooLarge, UnsupportedMediaType, Unprocessable, *KEY_ERRORS
        ),
    },
)
def drain_worker(
    session: WriteSession,
    _once: IdempotentRequest,
    caller: Caller,
    name: WorkerName,
    request: Request,
    body: DrainRequest | None = None,
) -> WorkerView:
    """The worker claims no more jobs, so that its machine can be taken away; repeating it changes nothing."""
    worker = repository.drain(session, name, (body or DrainRequest()).how)
    return _shown(session, [worker], caller.project, request.app.state.settings)[name]


def _shown(session: Session, found: Sequence[Worker], project: str, settings: Settings) -> dict[str, WorkerView]:
    """Views by name: one look at the jobs and at the clock for all of them."""
    held = sa.select(Job).where(Job.lease_owner.in_([worker.name for worker in found]), Job.status.in_(HELD))
    jobs = {job.lease_owner: job for job in session.scalars(held)}
    lost_before = session.scalars(sa.select(db_now(-settings.lease_seconds))).one()
    return {
        worker.name: WorkerView.of(worker, jobs.get(worker.name), project=project, lost=worker.seen_at < lost_before)
        for worker in found
    }


def _state(worker: Worker, job: Job | None, *, lost: bool) -> Literal["idle", "busy", "draining", "drained", "lost"]:
    if lost:
        return "lost"
    if worker.drain is not None:
        return "drained" if job is None else "draining"
    return "idle" if job is None else "busy"
