"""A job's events as they happen: server-sent events, read from the rows and therefore resumable anywhere.

Nothing is queued for anybody. A follower knows the number of the last event that it has sent, and asks for
what comes after it; one whose client reads slowly asks later.
"""

from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import APIRouter, Header, Request, Response
from starlette.types import Receive, Scope, Send

from api.auth import Caller
from api.jobs.schemas import EventView
from api.jobs.watcher import JobWatcher, Subscription, TooManyFollowers, closing_on_disconnect
from api.pagination import AfterNumber
from api.path_params import JobId
from api.problems import COMMON_PROBLEMS, problem_responses
from api.single_flight import SingleFlightCache
from domain.db import DATABASE_UNAVAILABLE, Database
from domain.errors import JobNotFound, Unavailable
from domain.jobs import repository
from domain.jobs.snapshot import JobSnapshot

_PAGE_EVENTS: Final = 50
_KEPT_PAGES: Final = 128
_RETRY: Final = b"retry: 2000\n\n"
_KEEP_ALIVE: Final = b": keep-alive\n\n"

_MESSAGE: Final = {
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
        description="The last number that the client has, as browsers send it; it goes before `after`.",
    ),
]


@dataclass(frozen=True)
class StreamPosition:
    """In the history of a job: behind the event of this number."""

    job_id: str
    after: int


@dataclass(frozen=True)
class EncodedEvents:
    """Some events that follow one another, as they are sent."""

    content: bytes
    last: int
    """The number of the last one; of the event before them where there are none."""


EventPageCache = SingleFlightCache[StreamPosition, EncodedEvents]


def create_event_page_cache(database: Database) -> EventPageCache:
    """Events of the jobs that are followed, each page read once for all who stand before it."""

    def read(place: StreamPosition) -> EncodedEvents:
        with database.transaction(write=False) as session:
            found = repository.list_events(session, place.job_id, after=place.after, limit=_PAGE_EVENTS).rows
        views = [EventView.of(row) for row in found]
        # Without a field `event`, so that a browser's `onmessage` gets those of types that it does not know.
        content = "".join(f"id: {view.id}\ndata: {view.model_dump_json()}\n\n" for view in views)
        return EncodedEvents(content.encode(), views[-1].id if views else place.after)

    # More may follow later, but these stay the ones that come next.
    return SingleFlightCache(read, lambda place, frames: frames.last > place.after, _KEPT_PAGES)


@router.get(
    "/{job_id}/events/stream",
    summary="Follow the events of a job",
    response_class=Response,
    responses={
        200: {
            "description": "Server-sent events: `id` is an event's number, `data` the event as lists have it.",
            "content": {"text/event-stream": {"schema": _MESSAGE}},
        },
        204: {"description": "The job has ended and nothing follows: do not reconnect."},
        **problem_responses(JobNotFound, Unavailable, TooManyFollowers),
    },
)
async def follow_job_events(
    caller: Caller, job_id: JobId, request: Request, after: AfterNumber = 0, last_event_id: LastEventId = 0
) -> Response:
    """The job's history from `after` on and then what happens, as it happens. The stream closes behind the event that
    ends the job. After any interruption go on with the last `id` as `Last-Event-ID`: nothing is lost or repeated.
    """
    watch: JobWatcher = request.app.state.watcher
    seen = await watch.snapshot(job_id)
    if seen is None or seen.project != caller.project:
        raise JobNotFound
    place = StreamPosition(job_id, last_event_id if "last-event-id" in request.headers else after)
    if seen.ended and place.after >= seen.event_seq:
        return Response(status_code=204)
    keep_alive = request.app.state.settings.keep_alive_seconds
    return _Stream(watch, request.app.state.event_pages, place, seen, keep_alive)


class _Stream(Response):
    media_type = "text/event-stream"

    def __init__(
        self,
        watch: JobWatcher,
        pages: EventPageCache,
        place: StreamPosition,
        seen: JobSnapshot,
        keep_alive_seconds: float,
    ) -> None:
        # No proxy may keep what it should pass on.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._watch = watch
        self._pages = pages
        self._place = place
        self._seen: JobSnapshot = seen
        self._keep_alive_seconds = keep_alive_seconds

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        with self._watch.subscribe(self._place.job_id) as follower, closing_on_disconnect(receive, follower):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send(send, _RETRY)
            await self._follow(follower, send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _follow(self, follower: Subscription, send: Send) -> None:
        seen: JobSnapshot | None = self._seen
        while seen is not None and not follower.closed:
            if not await self._catch_up(seen, follower, send) or seen.ended:
                return
            if await follower.wait_for(self._concerns, within=self._keep_alive_seconds):
                seen = follower.latest
            elif not follower.closed:
                await _send(send, _KEEP_ALIVE)

    def _concerns(self, latest: JobSnapshot | None) -> bool:
        # Progress alone is no event; were it to count, a stream of a job that trains would be silent for long.
        return latest is None or latest.ended or latest.event_seq > self._place.after

    async def _catch_up(self, seen: JobSnapshot, follower: Subscription, send: Send) -> bool:
        """Send what there is. False where the stream cannot go on."""
        while self._place.after < seen.event_seq and not follower.closed:
            try:
                frames = await self._pages.get(self._place)
            except DATABASE_UNAVAILABLE:
                # The client comes back, and goes on where it was.
                return False
            if frames.last == self._place.after:
                # The job was deleted.
                return False
            # Waits for as long as the client does not read.
            await _send(send, frames.content)
            self._place = StreamPosition(self._place.job_id, frames.last)
        return True


async def _send(send: Send, content: bytes) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": True})
