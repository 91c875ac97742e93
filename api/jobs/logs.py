"""The logs of a job over HTTP: any part of an attempt's log, and the log as it grows."""

from dataclasses import dataclass
from typing import Annotated, Final

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from api.auth import Caller
from api.dependencies import DatabaseDep, SettingsDep
from api.jobs.event_schemas import StreamEventType
from api.jobs.stream_cursor import StreamCursor
from api.jobs.streaming import FOLLOW_PROBLEMS, STREAM_SCHEMA, LastEventId, StreamReadsDep, follow
from api.jobs.watcher import WatcherDep
from api.path_params import JobId
from api.problems import COMMON_PROBLEMS, problem_responses
from api.sessions import heavy_slot
from domain.errors import JobNotFound, NotFound, Unprocessable
from domain.jobs import repository
from domain.jobs.engine_logs import LogChunk, LogExtent, log_extent, read_log, tail_start
from domain.jobs.models import JobAttempt
from pocl.errors import FieldError

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=COMMON_PROBLEMS)

_DEFAULT_BYTES: Final = 64 * 1024
_MAX_BYTES: Final = 1024 * 1024
_HEADERS: Final = {
    "Log-Attempt": "The number of the attempt; absent before the first.",
    "Log-Offset": "The offset of the first byte of the body. It is greater than `offset` where the log was dropped up "
    "to here.",
    "Log-Next-Offset": "The offset after the last byte of the body: `offset` of the next request.",
    "Log-Size": "The offset after the last byte of the log so far.",
    "Log-First-Offset": "The offset of the first byte that is kept.",
}


class AttemptNotFound(NotFound):
    """The job has no attempt of this number."""

    code = "attempt_not_found"


class LogParameters(BaseModel):
    """Which part of which log is read."""

    model_config = ConfigDict(extra="forbid")

    attempt: int | None = Field(
        default=None, ge=1, lt=2**31, description="The number of the attempt; the newest one unless given."
    )
    offset: int | None = Field(
        default=None, ge=0, lt=2**60, description="The first byte, counted from the start of the attempt's log."
    )
    limit: int = Field(default=_DEFAULT_BYTES, ge=1, le=_MAX_BYTES, description="The number of bytes at most.")
    tail: int | None = Field(
        default=None,
        ge=0,
        le=_MAX_BYTES,
        description="The number of bytes at the end of the log, instead of `offset`, from the start of a line on; "
        "65536 unless either is given.",
    )
    follow: bool = Field(
        default=False,
        description="Whether to go on with what is added, and with the logs of later attempts, until the job ends.",
    )

    def read(self, session: Session, project: str, job_id: str) -> "LogPart":
        """The part of the log, read only where it is not followed.

        Raises:
            Unprocessable: it begins at an offset and at the end.
            JobNotFound: the project has no such job.
            AttemptNotFound: the job has no such attempt.
        """
        if self.tail is not None and self.offset is not None:
            detail = "give `offset` or `tail`, not both"
            raise Unprocessable(field_errors=[FieldError("/query/tail", "offset_and_tail", detail)])
        row = _find_attempt(session, project, job_id, self.attempt)
        if row is None:
            return LogPart(0, LogExtent(0, 0), 0, None)
        tail = _DEFAULT_BYTES if self.tail is None else self.tail
        start = tail_start(session, row, tail) if self.offset is None else self.offset
        size = self.limit if self.offset is not None else max(self.limit, self.tail or 0)
        chunk = None if self.follow else read_log(session, row, offset=start, limit=size)
        return LogPart(row.number, log_extent(session, row), start, chunk)


@dataclass(frozen=True)
class LogPart:
    """A part of the log of an attempt."""

    attempt: int
    """The number of the attempt; 0 before the first."""
    extent: LogExtent
    start: int
    """The offset of its first byte, as it was asked for."""
    chunk: LogChunk | None
    """Null before the first attempt, and where the log is followed."""


@router.get(
    "/{job_id}/logs",
    summary="Read the log of a job",
    response_class=PlainTextResponse,
    responses={
        200: {
            "description": "A part of the engine's log; with `follow` server-sent events of the types `log` and `end`.",
            "headers": {
                name: {"description": description, "schema": {"type": "integer"}}
                for name, description in _HEADERS.items()
            },
            "content": {
                "text/plain": {"schema": {"type": "string"}},
                "text/event-stream": {"schema": STREAM_SCHEMA},
            },
        },
        204: {"description": "With `follow`: the job has ended and nothing follows: do not reconnect."},
        **FOLLOW_PROBLEMS,
        **problem_responses(JobNotFound, AttemptNotFound),
    },
)
async def get_job_logs(
    caller: Caller,
    job_id: JobId,
    database: DatabaseDep,
    watcher: WatcherDep,
    reads: StreamReadsDep,
    settings: SettingsDep,
    parameters: Annotated[LogParameters, Query()],
    last_event_id: LastEventId = None,
) -> Response:
    """A part of an attempt's log as text; empty before the first attempt. The log of every attempt can be read as far
    as it is kept: its end, of the size that the service sets. `follow` streams it as it grows; resume with
    `Last-Event-ID`.
    """

    def read() -> LogPart:
        with database.transaction(write=False) as session:
            return parameters.read(session, caller.project, job_id)

    async with heavy_slot():
        part = await run_sync(read)
    if parameters.follow:
        snapshot = await watcher.snapshot(job_id)
        if snapshot is None or snapshot.project != caller.project:
            raise JobNotFound
        begin = StreamCursor(attempt=part.attempt, offset=part.start)
        cursor = begin if last_event_id is None else StreamCursor.parse(last_event_id)
        return follow(
            watcher,
            reads,
            job_id,
            snapshot,
            cursor,
            types=frozenset({StreamEventType.LOG}),
            keep_alive_seconds=settings.keep_alive_seconds,
        )
    if part.chunk is None:
        return PlainTextResponse("")
    values = (part.attempt, part.chunk.start, part.chunk.end, part.extent.end, part.extent.first)
    headers = {name: str(value) for name, value in zip(_HEADERS, values, strict=True)}
    return PlainTextResponse(part.chunk.content, headers=headers)


def _find_attempt(session: Session, project: str, job_id: str, number: int | None) -> JobAttempt | None:
    """The attempt of this number, or the newest one; null before the first."""
    job = repository.get_job(session, project, job_id)
    if number is None:
        return repository.latest_attempt(session, job.id)
    row = repository.get_attempt(session, job.id, number)
    if row is None:
        raise AttemptNotFound
    return row
