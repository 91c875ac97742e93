"""One job, asked for again and again: a poll costs little, and a long one costs nothing while it waits."""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Annotated, Final

import orjson
from fastapi import APIRouter, Query, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api import etags
from api.auth import Caller, Principal, identify
from api.jobs.presenter import present_job_at
from api.jobs.schemas import JobView
from api.jobs.watcher import JobWatcher, TooManyFollowers, closing_on_disconnect
from api.path_params import JobId
from api.problems import COMMON_PROBLEMS, database_unavailable_response, problem_response, problem_responses
from api.single_flight import SingleFlightCache
from domain.db import DATABASE_UNAVAILABLE, Database
from domain.errors import ApiError, JobNotFound, Unavailable
from domain.jobs import repository
from domain.jobs.queue import QueuePosition
from domain.jobs.snapshot import JobSnapshot, job_snapshots

MAX_WAIT: Final = 60
_KEPT_ANSWERS: Final = 512
_POLLED: Final = re.compile(r"/v1/jobs/(job_[0-9a-z]{8,40})")

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=COMMON_PROBLEMS)


@dataclass(frozen=True)
class Representation:
    etag: str
    content: bytes


@dataclass(frozen=True)
class RepresentationKey:
    """The answer that a job's state makes."""

    project: str
    job_id: str
    etag: str


RepresentationCache = SingleFlightCache[RepresentationKey, Representation]


def create_representation_cache(database: Database, *, worker_seconds: float) -> RepresentationCache:
    """RepresentationCache of the jobs that are polled, each made once for all who poll.

    Args:
        worker_seconds: a worker that was not heard of for longer does not count.
    """

    def make(wanted: RepresentationKey) -> Representation:
        with database.transaction(write=False) as session:
            job = repository.get_job(session, wanted.project, wanted.job_id)
            seen = job_snapshots(session, [job.id], worker_seconds=worker_seconds)[job.id]
            view = present_job_at(session, job, seen.place)
        return Representation(_etag(seen), view.model_dump_json().encode())

    # The job may have changed in between: then this is the answer of another state.
    return SingleFlightCache(make, lambda wanted, made: made.etag == wanted.etag, _KEPT_ANSWERS)


@router.get(
    "/{job_id}",
    summary="Get a job",
    response_model=JobView,
    responses={
        304: {"description": "`If-None-Match` names this state of the job."},
        **problem_responses(JobNotFound, Unavailable, TooManyFollowers),
    },
)
async def get_job(
    caller: Caller,
    job_id: JobId,
    request: Request,
    wait: Annotated[
        float, Query(ge=0, le=MAX_WAIT, allow_inf_nan=False, description="Seconds to wait for a change at most.")
    ] = 0,
) -> Response:
    """How far the job is, when it may end, and its place in the queue. Send `ETag` back as `If-None-Match`: polling
    then costs a 304 until something changes.

    With `wait` the answer comes as soon as the job is not in the state that `If-None-Match` names any more, or at the
    end of that time. Without `If-None-Match` it waits for a change of a job that has not ended.
    """
    watch: JobWatcher = request.app.state.watcher
    seen = await _get_snapshot(watch, caller.project, job_id)
    if wait and _is_unchanged(request, seen):
        with watch.subscribe(job_id) as follower, closing_on_disconnect(request.receive, follower):
            await follower.wait_for(lambda latest: latest != seen, within=wait)
        seen = await _get_snapshot(watch, caller.project, job_id)
    return await _answer(request, caller, job_id, seen)


class PollFastPath:
    """ASGI middleware; the innermost one. RepresentationCache the plain poll, which most requests are, past the router.

    FieldErrorView a route and the values of its parameters takes more than half of the time of a poll.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        polled = _POLLED.fullmatch(scope.get("path", "")) if scope.get("method") == "GET" else None
        if polled is None or scope["query_string"]:
            await self._app(scope, receive, send)
            return
        answer = await _poll(Request(scope), polled[1])
        await answer(scope, receive, send)


async def _poll(request: Request, job_id: str) -> Response:
    try:
        caller = await identify(request)
        return await _answer(
            request, caller, job_id, await _get_snapshot(request.app.state.watcher, caller.project, job_id)
        )
    except ApiError as error:
        return problem_response(request, error)
    except DATABASE_UNAVAILABLE as error:
        return database_unavailable_response(request, error)


async def _answer(request: Request, caller: Principal, job_id: str, seen: JobSnapshot) -> Response:
    etag = _etag(seen)
    if etags.if_none_match(request, etag):
        return etags.not_modified(etag)
    made = await request.app.state.representations.get(RepresentationKey(caller.project, job_id, etag))
    return Response(made.content, media_type="application/json", headers={"etag": made.etag})


async def _get_snapshot(watch: JobWatcher, project: str, job_id: str) -> JobSnapshot:
    seen = await watch.snapshot(job_id)
    if seen is None or seen.project != project:
        raise JobNotFound
    return seen


def _is_unchanged(request: Request, seen: JobSnapshot) -> bool:
    if "if-none-match" in request.headers:
        return etags.if_none_match(request, _etag(seen))
    return not seen.ended


def _etag(seen: JobSnapshot) -> str:
    # All that an answer shows changes with the row's version, but for the place in the queue.
    return f'"{_schema_digest()}-{seen.version}{_place_tag(seen.place)}"'


def _place_tag(place: QueuePosition | None) -> str:
    if place is None:
        return ""
    start = "" if place.starts_at is None else f"{place.starts_at.timestamp():.0f}"
    return f"-{place.position}-{place.reason}-{start}"


@cache
def _schema_digest() -> str:
    # Another version of the service may show the same row otherwise.
    described = orjson.dumps([version("pocl-service"), JobView.model_json_schema(mode="serialization")])
    return hashlib.sha256(described).hexdigest()[:12]
