"""A job's events, progress, metrics and logs as they happen: server-sent events, read from the rows and therefore
resumable on any API process.

Nothing is queued for a client. A stream knows what of the history, the metrics and the logs it has sent, and reads what
comes after; a client that reads slowly makes its stream read later.
"""

import asyncio
from contextlib import suppress
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import AfterValidator
from starlette.types import Receive, Scope, Send

from api.auth import Caller
from api.client_shares import ClientShareExceeded, client_of
from api.dependencies import SettingsDep
from api.jobs.event_schemas import HISTORY_TYPES, LIVE_TYPES, ProgressMessage, StreamEventType
from api.jobs.presenter import present_progress
from api.jobs.stream_cursor import StreamCursor
from api.jobs.stream_reads import EventsKey, Frame, StreamReads, frame, history_filter
from api.jobs.watcher import JobWatcher, Subscription, TooManyFollowers, WatcherDep, closing_on_disconnect
from api.pagination import AfterNumber
from api.path_params import JobId
from api.problems import COMMON_PROBLEMS, problem_responses
from domain.database_errors import DatabaseUnavailable
from domain.errors import JobNotFound, Unavailable
from domain.jobs.live_progress import LiveProgress
from domain.jobs.snapshot import JobSnapshot

_PROGRESS_SECONDS: Final = 1.0
"""The least time between two messages of progress."""
# Neither ends in an empty line, which some clients take for the end of a message without data.
_RETRY: Final = b"retry: 2000\n"
_KEEP_ALIVE: Final = b": keep-alive\n"

# Before OpenAPI 3.2, which has `itemSchema` for it, the schema of a stream is that of each event.
STREAM_SCHEMA: Final = {"$ref": "#/components/schemas/ServerSentMessage"}
FOLLOW_PROBLEMS: Final = problem_responses(JobNotFound, Unavailable, TooManyFollowers, ClientShareExceeded)
"""The problems of an operation that answers with a stream."""

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=COMMON_PROBLEMS)


def _check_cursor(text: str | None) -> str | None:
    if text is not None:
        StreamCursor.parse(text)
    return text


LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID",
        max_length=64,
        description="The id of the last message that the client has, as browsers send it; it overrides where the "
        "stream would begin.",
    ),
    AfterValidator(_check_cursor),
]
Types = Annotated[
    list[StreamEventType],
    Query(
        default_factory=list,
        max_length=len(StreamEventType),
        description="The types of the messages to get; may be repeated. Unless given, the whole history: all but "
        "`progress`, `metric` and `log`. A stream always has its `end`.",
    ),
]


async def _get_stream_reads(request: Request) -> StreamReads:
    reads: StreamReads = request.app.state.stream_reads
    return reads


StreamReadsDep = Annotated[StreamReads, Depends(_get_stream_reads)]


@router.get(
    "/{job_id}/events/stream",
    summary="Follow a job",
    response_class=Response,
    responses={
        200: {
            "description": "Server-sent events: `event` is the type of the message, `data` its content as JSON, and of "
            "an event of the history the event as lists have it.",
            "content": {"text/event-stream": {"schema": STREAM_SCHEMA}},
        },
        204: {"description": "The job has ended and nothing follows: do not reconnect."},
        **FOLLOW_PROBLEMS,
    },
)
async def follow_job_events(
    caller: Caller,
    job_id: JobId,
    watcher: WatcherDep,
    reads: StreamReadsDep,
    settings: SettingsDep,
    types: Types,
    after: AfterNumber = 0,
    last_event_id: LastEventId = None,
) -> Response:
    """The events of the job after `after`, and then new ones as they happen; with `types` also its progress, the
    metrics of each step and its log, from their beginnings on. The stream closes after the event that ends the job.
    Resume an interrupted stream with the last `id` as `Last-Event-ID`: nothing but progress is lost, and nothing is
    repeated.
    """
    cursor = StreamCursor(after) if last_event_id is None else StreamCursor.parse(last_event_id)
    snapshot = await watcher.snapshot(job_id)
    if snapshot is None or snapshot.project != caller.project:
        raise JobNotFound
    return follow(
        watcher,
        reads,
        job_id,
        snapshot,
        cursor,
        types=frozenset(types) or HISTORY_TYPES,
        keep_alive_seconds=settings.keep_alive_seconds,
    )


def follow(
    watcher: JobWatcher,
    reads: StreamReads,
    job_id: str,
    snapshot: JobSnapshot,
    cursor: StreamCursor,
    *,
    types: frozenset[StreamEventType],
    keep_alive_seconds: float,
) -> Response:
    """The stream of a job from a position on; 204 where nothing follows it."""
    if snapshot.ended and cursor.after >= snapshot.event_seq:
        return Response(status_code=204)
    return _EventStream(watcher, reads, job_id, snapshot, cursor, types=types, keep_alive_seconds=keep_alive_seconds)


class _EventStream(Response):
    media_type = "text/event-stream"

    def __init__(
        self,
        watcher: JobWatcher,
        reads: StreamReads,
        job_id: str,
        snapshot: JobSnapshot,
        cursor: StreamCursor,
        *,
        types: frozenset[StreamEventType],
        keep_alive_seconds: float,
    ) -> None:
        # No proxy may store or buffer the stream.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._watcher = watcher
        self._reads = reads
        self._job_id = job_id
        self._snapshot = snapshot
        self._cursor = cursor
        self._types = types
        self._history = history_filter(types)
        self._is_live = not types.isdisjoint(LIVE_TYPES)
        self._keep_alive_seconds = keep_alive_seconds
        self._progress: LiveProgress | None = None
        """The progress that was sent last."""
        self._progress_due = 0.0
        """When the next progress may be sent, by the clock of the event loop."""
        self._log_bytes = -1
        """How much log there was when it was last read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        if scope["method"] == "HEAD":
            await send(start)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        with (
            self._watcher.subscribe(self._job_id, client=client_of(scope), live=self._is_live) as subscription,
            closing_on_disconnect(receive, subscription),
        ):
            await send(start)
            await _send(send, _RETRY)
            # Where the database fails the client reconnects, and resumes after the last message.
            with suppress(DatabaseUnavailable):
                await self._follow(subscription, send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _follow(self, subscription: Subscription, send: Send) -> None:
        snapshot: JobSnapshot | None = self._snapshot
        while snapshot is not None and not subscription.closed:
            await self._catch_up(snapshot, subscription, send)
            if snapshot.ended:
                return
            await self._send_live(subscription.live, subscription, send)
            timeout = self._keep_alive_seconds
            if self._has_new_progress(subscription.live):
                timeout = min(timeout, max(0.0, self._progress_due - asyncio.get_running_loop().time()))
            if await subscription.wait_for(lambda latest: self._has_news(latest, subscription.live), timeout=timeout):
                snapshot = subscription.latest
            elif not subscription.closed and timeout == self._keep_alive_seconds:
                await _send(send, _KEEP_ALIVE)

    def _has_news(self, latest: JobSnapshot | None, live: LiveProgress | None) -> bool:
        # Progress that nobody asked for is no news: if it counted, the keep-alive would never be due.
        if latest is None or latest.ended or latest.event_seq > self._cursor.after:
            return True
        if live is None:
            return False
        if StreamEventType.METRIC in self._types and live.step > self._cursor.step:
            return True
        if StreamEventType.LOG in self._types and live.log_bytes != self._log_bytes:
            return True
        return self._has_new_progress(live) and asyncio.get_running_loop().time() >= self._progress_due

    def _has_new_progress(self, live: LiveProgress | None) -> bool:
        return live is not None and StreamEventType.PROGRESS in self._types and live != self._progress

    async def _catch_up(self, snapshot: JobSnapshot, subscription: Subscription, send: Send) -> None:
        """Send the events of the history up to the snapshot."""
        while self._cursor.after < snapshot.event_seq and not subscription.closed:
            page = await self._reads.events.get(EventsKey(self._job_id, self._cursor.after, self._history))
            if self._history is None and not page.frames:
                # The job was deleted.
                subscription.close()
                return
            last = page.last if page.has_more else max(page.last, snapshot.event_seq)
            if not self._is_live and self._types >= HISTORY_TYPES:
                # Backpressure: this waits for as long as the client does not read.
                await _send(send, page.content)
            else:
                await self._send_events(page.frames, subscription, send)
            self._cursor = self._cursor.moved(after=last)

    async def _send_events(self, frames: tuple[Frame, ...], subscription: Subscription, send: Send) -> None:
        for each in frames:
            if each.type is StreamEventType.END:
                # The end is the last that a client hears: what the job has logged and measured comes before it.
                await self._send_metrics(subscription, send)
                await self._send_logs(subscription, send)
            self._cursor = self._cursor.moved(after=each.number)
            if each.type in self._types or each.type is StreamEventType.END:
                await self._send_frame(each, send)

    async def _send_live(self, live: LiveProgress | None, subscription: Subscription, send: Send) -> None:
        if live is None:
            return
        if live.step > self._cursor.step:
            await self._send_metrics(subscription, send)
        if live.log_bytes != self._log_bytes:
            await self._send_logs(subscription, send)
            self._log_bytes = live.log_bytes
        now = asyncio.get_running_loop().time()
        if self._has_new_progress(live) and now >= self._progress_due:
            self._progress, self._progress_due = live, now + _PROGRESS_SECONDS
            content = ProgressMessage.model_validate(present_progress(live)).model_dump_json().encode()
            await _send(send, frame(StreamEventType.PROGRESS, 0, content).content)

    async def _send_metrics(self, subscription: Subscription, send: Send) -> None:
        while StreamEventType.METRIC in self._types and not subscription.closed:
            frames = await self._reads.metrics.get((self._job_id, self._cursor.step))
            if not frames:
                return
            for each in frames:
                self._cursor = self._cursor.moved(step=each.number)
                await self._send_frame(each, send)

    async def _send_logs(self, subscription: Subscription, send: Send) -> None:
        while StreamEventType.LOG in self._types and not subscription.closed:
            frames = await self._reads.logs.get((self._job_id, self._cursor.attempt, self._cursor.offset))
            if not frames:
                return
            for each in frames:
                self._cursor = self._cursor.moved(attempt=each.attempt, offset=each.number)
                await self._send_frame(each, send)

    async def _send_frame(self, each: Frame, send: Send) -> None:
        is_composite = not self._types.isdisjoint({StreamEventType.METRIC, StreamEventType.LOG})
        id_ = self._cursor.encode() if is_composite else str(self._cursor.after)
        await _send(send, b"id: %s\n%s" % (id_.encode(), each.content))


async def _send(send: Send, content: bytes) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": True})
