"""Polling one job: a poll is a conditional request and costs little, and a long poll costs nothing while it waits."""

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
from api.auth import Caller, principal_of
from api.client_shares import ClientShareExceeded, client_of
from api.jobs.presenter import present_job_at
from api.jobs.schemas import JobView
from api.jobs.watcher import JobWatcher, TooManyFollowers, WatcherDep, closing_on_disconnect
from api.path_params import JobId
from api.prefix import path_below_prefix
from api.principal import Principal
from api.problems import COMMON_PROBLEMS, database_unavailable_response, problem_response, problem_responses
from api.single_flight import SingleFlightCache
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.errors import ApiError, JobNotFound, Unavailable
from domain.jobs import repository
from domain.jobs.queue import QueuePosition
from domain.jobs.snapshot import JobSnapshot, job_snapshots

MAX_WAIT: Final = 60
_CACHED_REPRESENTATIONS: Final = 512
_POLL_ROUTE: Final = "/v1/jobs/{job_id}"
_POLL_PATH: Final = re.compile(r"/v1/jobs/(job_[0-9a-z]{8,40})")

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=COMMON_PROBLEMS)


@dataclass(frozen=True)
class Representation:
    """A job as JSON (RFC 9110, section 3.2), with its strong validator."""

    etag: str
    content: bytes


@dataclass(frozen=True)
class RepresentationKey:
    """Names the representation of one state of a job."""

    project: str
    job_id: str
    etag: str


RepresentationCache = SingleFlightCache[RepresentationKey, Representation]


def create_representation_cache(database: Database, *, worker_seconds: float) -> RepresentationCache:
    """Representations of the jobs that are polled, each rendered once for all clients.

    Args:
        worker_seconds: a worker that has been silent for longer does not count in the queue.
    """

    def render(key: RepresentationKey) -> Representation:
        with database.transaction(write=False) as session:
            job = repository.get_job(session, key.project, key.job_id)
            snapshot = job_snapshots(session, [job.id], worker_seconds=worker_seconds)[job.id]
            view = present_job_at(session, job, snapshot.queue_position)
        return Representation(_etag(snapshot), view.model_dump_json().encode())

    # Where the job has changed meanwhile, the representation is that of another state: sent, but not cached.
    return SingleFlightCache(render, lambda key, rendered: rendered.etag == key.etag, _CACHED_REPRESENTATIONS)


@router.get(
    "/{job_id}",
    summary="Get a job",
    response_model=JobView,
    responses={
        304: {"description": "The entity tag in `If-None-Match` is that of the job's present state."},
        **problem_responses(JobNotFound, Unavailable, TooManyFollowers, ClientShareExceeded),
    },
)
async def get_job(
    caller: Caller,
    job_id: JobId,
    request: Request,
    watcher: WatcherDep,
    wait: Annotated[
        float,
        Query(ge=0, le=MAX_WAIT, allow_inf_nan=False, description="How long to wait for a change at most, in seconds."),
    ] = 0,
) -> Response:
    """The job with its progress, its expected end and its position in the queue. Send `ETag` back as `If-None-Match`:
    polling then costs a 304 until something changes.

    With `wait` the response comes as soon as the job is not in the state that `If-None-Match` names any more, or at the
    end of that time. Without `If-None-Match` it waits for a change of a job that has not ended.
    """
    snapshot = await _get_snapshot(watcher, caller.project, job_id)
    if wait and _is_unchanged(request, snapshot):
        client = client_of(request.scope)
        request.scope["state"]["waits"] = True
        with (
            watcher.subscribe(job_id, client=client) as subscription,
            closing_on_disconnect(request.receive, subscription),
        ):
            await subscription.wait_for(lambda latest: latest != snapshot, timeout=wait)
        snapshot = await _get_snapshot(watcher, caller.project, job_id)
    return await _respond(request, caller, job_id, snapshot)


class PollFastPath:
    """ASGI middleware; the innermost one. Answers the plain poll, which most requests are, past the router.

    Finding a route and the values of its parameters takes more than half of the time of a poll.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match = _match_plain_poll(scope)
        if match is None:
            await self._app(scope, receive, send)
            return
        scope["state"]["route"] = _POLL_ROUTE
        response = await _poll(Request(scope), match[1])
        await response(scope, receive, send)


def is_plain_poll(scope: Scope) -> bool:
    """Whether a request asks for the present state of a job, and nothing more."""
    return _match_plain_poll(scope) is not None


def _match_plain_poll(scope: Scope) -> re.Match[str] | None:
    if scope.get("method") != "GET" or scope["query_string"]:
        return None
    return _POLL_PATH.fullmatch(path_below_prefix(scope))


async def _poll(request: Request, job_id: str) -> Response:
    try:
        caller = principal_of(request)
        snapshot = await _get_snapshot(request.app.state.watcher, caller.project, job_id)
        return await _respond(request, caller, job_id, snapshot)
    except ApiError as error:
        return problem_response(request, error)
    except DatabaseUnavailable as error:
        return database_unavailable_response(request, error)


async def _respond(request: Request, caller: Principal, job_id: str, snapshot: JobSnapshot) -> Response:
    etag = _etag(snapshot)
    if etags.if_none_match(request, etag):
        return etags.not_modified(etag)
    representations: RepresentationCache = request.app.state.representations
    rendered = await representations.get(RepresentationKey(caller.project, job_id, etag))
    return Response(rendered.content, media_type="application/json", headers={"etag": rendered.etag})


async def _get_snapshot(watcher: JobWatcher, project: str, job_id: str) -> JobSnapshot:
    snapshot = await watcher.snapshot(job_id)
    if snapshot is None or snapshot.project != project:
        raise JobNotFound
    return snapshot


def _is_unchanged(request: Request, snapshot: JobSnapshot) -> bool:
    """Whether the client has the present state already, so that a long poll waits."""
    if "if-none-match" in request.headers:
        return etags.if_none_match(request, _etag(snapshot))
    return not snapshot.ended


def _etag(snapshot: JobSnapshot) -> str:
    # All that a view shows changes with the row's version, but for the position in the queue.
    return f'"{_schema_digest()}-{snapshot.version}{_position_tag(snapshot.queue_position)}"'


def _position_tag(position: QueuePosition | None) -> str:
    if position is None:
        return ""
    start = "" if position.starts_at is None else f"{position.starts_at.timestamp():.0f}"
    return f"-{position.position}-{position.reason}-{start}"


@cache
def _schema_digest() -> str:
    # Another version of the service may show the same row otherwise.
    schema = orjson.dumps([version("pocl-service"), JobView.model_json_schema(mode="serialization")])
    return hashlib.sha256(schema).hexdigest()[:12]
