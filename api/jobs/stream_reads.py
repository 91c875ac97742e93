"""What event streams read: pages of events, metrics and logs, each read once for all streams of a job."""

from dataclasses import dataclass
from typing import Final

import orjson

from api.jobs.event_schemas import (
    HISTORY_TYPES,
    LogMessage,
    MetricMessage,
    StreamEventType,
    events_of_types,
    stream_type_of,
)
from api.jobs.schemas import EventView
from api.single_flight import SingleFlightCache
from domain.db import Database
from domain.jobs import engine_logs, repository
from domain.jobs.models import METRICS

_EVENTS_PER_READ: Final = 50
_STEPS_PER_READ: Final = 200
_CACHED_READS: Final = 128
_CACHED_LOGS: Final = 32


@dataclass(frozen=True)
class EventsKey:
    """Names the events of a job's history after one, of some types."""

    job_id: str
    after: int
    types: frozenset[str] | None
    """Of the history's events; null for all."""


@dataclass(frozen=True)
class Frame:
    """A server-sent message without its id."""

    type: StreamEventType
    number: int
    """The position after it: the number of the event, the step, or the offset in the log."""
    content: bytes
    attempt: int = 0
    """The attempt, of a message with a part of a log."""


@dataclass(frozen=True)
class EventsPage:
    """Consecutive events of a job's history as server-sent messages."""

    frames: tuple[Frame, ...]
    content: bytes
    """All of them, with their numbers as ids."""
    last: int
    """The number of the last event; without any, that of the position that was read from."""
    has_more: bool

    @property
    def ends(self) -> bool:
        """Whether the event is among them that ended the job."""
        return any(frame.type is StreamEventType.END for frame in self.frames)


def frame(type_: StreamEventType, number: int, content: bytes, *, attempt: int = 0) -> Frame:
    """A server-sent message with this JSON."""
    return Frame(type_, number, b"event: %s\ndata: %s\n\n" % (type_.value.encode(), content), attempt)


class StreamReads:
    """The caches of all event streams of a process."""

    def __init__(self, database: Database) -> None:
        def read_events(key: EventsKey) -> EventsPage:
            with database.transaction(write=False) as session:
                page = repository.list_events(
                    session, key.job_id, after=key.after, limit=_EVENTS_PER_READ, types=key.types
                )
            views = [EventView.model_validate(row) for row in page.rows]
            frames = tuple(
                frame(stream_type_of(view.type, view.data), view.id, view.model_dump_json().encode()) for view in views
            )
            content = b"".join(b"id: %d\n%s" % (each.number, each.content) for each in frames)
            return EventsPage(frames, content, views[-1].id if views else key.after, page.has_more)

        def read_metrics(key: tuple[str, int]) -> tuple[Frame, ...]:
            job_id, after = key
            with database.transaction(write=False) as session:
                steps = repository.metrics_after(session, job_id, METRICS, after=after, steps=_STEPS_PER_READ)
            return tuple(
                frame(StreamEventType.METRIC, step, _json(MetricMessage(step=step, values=values)))
                for step, values in steps.items()
            )

        def read_logs(key: tuple[str, int, int]) -> tuple[Frame, ...]:
            job_id, attempt, offset = key
            with database.transaction(write=False) as session:
                chunks = engine_logs.next_log_chunks(session, job_id, attempt=attempt, offset=offset)
            return tuple(
                frame(
                    StreamEventType.LOG,
                    each.chunk.end,
                    _json(
                        LogMessage(
                            attempt=each.attempt,
                            offset=each.chunk.start,
                            next_offset=each.chunk.end,
                            text=each.chunk.content.decode("utf-8", "replace"),
                        )
                    ),
                    attempt=each.attempt,
                )
                for each in chunks
            )

        # More may follow later, but what was read stays the next after the position.
        self.events: SingleFlightCache[EventsKey, EventsPage] = SingleFlightCache(
            read_events, lambda key, page: page.last > key.after, _CACHED_READS
        )
        self.metrics: SingleFlightCache[tuple[str, int], tuple[Frame, ...]] = SingleFlightCache(
            read_metrics, lambda _, frames: bool(frames), _CACHED_READS
        )
        self.logs: SingleFlightCache[tuple[str, int, int], tuple[Frame, ...]] = SingleFlightCache(
            read_logs, lambda _, frames: bool(frames), _CACHED_LOGS
        )


def history_filter(types: frozenset[StreamEventType]) -> frozenset[str] | None:
    """The history's events that a stream of these types reads; null for all of them."""
    return None if types >= HISTORY_TYPES else events_of_types(types)


def _json(message: MetricMessage | LogMessage) -> bytes:
    return orjson.dumps(message.model_dump(mode="json"))
