"""A job's events as they happen: server-sent events, read from the rows and therefore resumable on any API process.

Nothing is queued for a client. A stream knows the number of the last event that it has sent, and reads the events
after it; a client that reads slowly makes its stream read later.
"""

from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, Request, Response
from starlette.types import Receive, Scope, Send

from api.auth import Caller
from api.client_shares import ClientShareExceeded, client_of
from api.dependencies import SettingsDep
from api.jobs.schemas import EventView
from api.jobs.watcher import JobWatcher, Subscription, TooManyFollowers, WatcherDep, closing_on_disconnect
from api.pagination import AfterNumber
from api.path_params import JobId
from api.problems import COMMON_PROBLEMS, problem_responses
from api.single_flight import SingleFlightCache
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.errors import JobNotFound, Unavailable
from domain.jobs import repository
from domain.jobs.snapshot import JobSnapshot

_EVENTS_PER_READ: Final = 50
_CACHED_READS: Final = 128
_RETRY: Final = b"retry: 2000\n\n"
_KEEP_ALIVE: Final = b": keep-alive\n\n"

_MESSAGE_SCHEMA: Final = {
    "type": "object",
    "description": "One message.",
    "required": ["id", "data"],
    "properties": {
        "id": {"type": "string"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": f"#/components/schemas/{EventView.__name__}"},
        },
    },
}

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=COMMON_PROBLEMS)

LastEventId = Annotated[
    int,
    Header(
        alias="Last-Event-ID",
        ge=0,
        lt=2**31,
        description="The number of the last event that the client has, as browsers send it; it overrides `after`.",
    ),
]


@dataclass(frozen=True)
class StreamPosition:
    """A position in the history of a job: after the event of this number."""

    job_id: str
    after: int


@dataclass(frozen=True)
class EncodedEvents:
    """Consecutive events as server-sent messages."""

    content: bytes
    last: int
    """The number of the last event; without any, that of the position that was read from."""


EventCache = SingleFlightCache[StreamPosition, EncodedEvents]


def create_event_cache(database: Database) -> EventCache:
    """The events after each position, read once for all streams."""

    def read(position: StreamPosition) -> EncodedEvents:
        with database.transaction(write=False) as session:
            page = repository.list_events(session, position.job_id, after=position.after, limit=_EVENTS_PER_READ)
        views = [EventView.model_validate(row) for row in page.rows]
        # Messages have no field `event`, so that a browser's `onmessage` gets events of types that it does not know.
        content = "".join(f"id: {view.id}\ndata: {view.model_dump_json()}\n\n" for view in views)
        return EncodedEvents(content.encode(), views[-1].id if views else position.after)

    # More events may follow later, but these stay the next ones after the position.
    return SingleFlightCache(read, lambda position, events: events.last > position.after, _CACHED_READS)


async def _get_event_cache(request: Request) -> EventCache:
    event_cache: EventCache = request.app.state.event_cache
    return event_cache


EventCacheDep = Annotated[EventCache, Depends(_get_event_cache)]


@router.get(
    "/{job_id}/events/stream",
    summary="Follow the events of a job",
    response_class=Response,
    responses={
        200: {
            "description": "Server-sent events: `id` is the event's number, `data` the event as lists have it.",
            "content": {"text/event-stream": {"schema": _MESSAGE_SCHEMA}},
        },
        204: {"description": "The job has ended and no event follows: do not reconnect."},
        **problem_responses(JobNotFound, Unavailable, TooManyFollowers, ClientShareExceeded),
    },
)
async def follow_job_events(
    caller: Caller,
    job_id: JobId,
    request: Request,
    watcher: WatcherDep,
    event_cache: EventCacheDep,
    settings: SettingsDep,
    after: AfterNumber = 0,
    last_event_id: LastEventId = 0,
) -> Response:
    """The events of the job after `after`, and then new ones as they happen. The stream closes after the event that
    ends the job. Resume an interrupted stream with the last `id` as `Last-Event-ID`: no event is lost or repeated.
    """
    snapshot = await watcher.snapshot(job_id)
    if snapshot is None or snapshot.project != caller.project:
        raise JobNotFound
    position = StreamPosition(job_id, last_event_id if "last-event-id" in request.headers else after)
    if snapshot.ended and position.after >= snapshot.event_seq:
        return Response(status_code=204)
    return _EventStream(watcher, event_cache, position, snapshot, keep_alive_seconds=settings.keep_alive_seconds)


class _EventStream(Response):
    media_type = "text/event-stream"

    def __init__(
        self,
        watcher: JobWatcher,
        event_cache: EventCache,
        position: StreamPosition,
        snapshot: JobSnapshot,
        *,
        keep_alive_seconds: float,
    ) -> None:
        # No proxy may store or buffer the stream.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._watcher = watcher
        self._event_cache = event_cache
        self._position = position
        self._snapshot = snapshot
        self._keep_alive_seconds = keep_alive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        if scope["method"] == "HEAD":
            await send(start)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        with (
            self._watcher.subscribe(self._position.job_id, client=client_of(scope)) as subscription,
            closing_on_disconnect(receive, subscription),
        ):
            await send(start)
            await _send(send, _RETRY)
            await self._follow(subscription, send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _follow(self, subscription: Subscription, send: Send) -> None:
        snapshot: JobSnapshot | None = self._snapshot
        while snapshot is not None and not subscription.closed:
            if not await self._catch_up(snapshot, subscription, send) or snapshot.ended:
                return
            if await subscription.wait_for(self._has_news, timeout=self._keep_alive_seconds):
                snapshot = subscription.latest
            elif not subscription.closed:
                await _send(send, _KEEP_ALIVE)

    def _has_news(self, latest: JobSnapshot | None) -> bool:
        # Progress alone is no event; if it counted, the keep-alive of a job that trains would never be due.
        return latest is None or latest.ended or latest.event_seq > self._position.after

    async def _catch_up(self, snapshot: JobSnapshot, subscription: Subscription, send: Send) -> bool:
        """Send the events up to the snapshot. False where the stream cannot go on."""
        while self._position.after < snapshot.event_seq and not subscription.closed:
            try:
                events = await self._event_cache.get(self._position)
            except DatabaseUnavailable:
                # The client reconnects, and resumes after its last event.
                return False
            if events.last == self._position.after:
                # The job was deleted.
                return False
            # Backpressure: this waits for as long as the client does not read.
            await _send(send, events.content)
            self._position = StreamPosition(self._position.job_id, events.last)
        return True


async def _send(send: Send, content: bytes) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": True})
