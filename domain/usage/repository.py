"""Usage of devices and storage by project and day. No function commits."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import upsert_into
from domain.usage.models import ChatDay, StorageDay, UsageRecord


@dataclass(frozen=True)
class AttemptUse:
    """The device that an attempt computes on, and since when."""

    project: str
    job_id: str
    attempt: int
    worker: str
    device: str | None
    """`cpu` or `cuda`; null where that was not noted."""
    started_at: datetime

    def by_day(self, until: datetime) -> Iterator[tuple[date, float]]:
        """The days in UTC until this moment, and the seconds of each."""
        at = self.started_at
        while at < until:
            midnight = datetime.combine(at.date() + timedelta(days=1), time(), UTC)
            end = min(midnight, until)
            yield at.date(), (end - at).total_seconds()
            at = end


@dataclass(frozen=True)
class ChatUse:
    """The tokens of one conversation that a model read, and of its answer."""

    prompt_tokens: int
    completion_tokens: int


@dataclass
class DayUsage:
    """What a project used on one day."""

    day: date
    gpu_seconds: float = 0.0
    cpu_seconds: float = 0.0
    other_seconds: float = 0.0
    """Of attempts from before their device was noted."""
    attempts: int = 0
    """How many attempts computed on that day."""
    jobs: int = 0
    """How many jobs computed on that day."""
    storage_bytes: int | None = None
    """The most that its files took; null where nobody looked."""
    chat_requests: int = 0
    """How many conversations were answered, as far as they were."""
    chat_prompt_tokens: int = 0
    chat_completion_tokens: int = 0

    def add(self, device: str | None, seconds: float) -> None:
        """Add seconds on a kind of device."""
        if device == "cuda":
            self.gpu_seconds += seconds
        elif device == "cpu":
            self.cpu_seconds += seconds
        else:
            self.other_seconds += seconds


def record_attempt(session: Session, use: AttemptUse, until: datetime) -> None:
    """Record what an attempt used that has ended."""
    session.add_all(
        UsageRecord(
            job_id=use.job_id,
            attempt=use.attempt,
            day=day,
            project=use.project,
            worker=use.worker,
            device=use.device,
            seconds=seconds,
        )
        for day, seconds in use.by_day(until)
    )


def record_storage(session: Session, day: date, sizes: Mapping[str, int]) -> None:
    """Record how many bytes the files of each project take on this day; the most of the day counts."""
    for project, size in sorted(sizes.items()):
        statement = upsert_into(session.connection(), StorageDay).values(project=project, day=day, bytes=size)
        larger = sa.case((StorageDay.bytes < size, size), else_=StorageDay.bytes)
        session.execute(
            statement.on_conflict_do_update(index_elements=["project", "day"], set_={"bytes": larger}),
        )


def record_chat(session: Session, project: str, day: date, use: ChatUse) -> None:
    """Add a conversation to what the project used on this day."""
    added = {"requests": 1, "prompt_tokens": use.prompt_tokens, "completion_tokens": use.completion_tokens}
    statement = upsert_into(session.connection(), ChatDay).values(project=project, day=day, **added)
    sums = {name: getattr(ChatDay, name) + value for name, value in added.items()}
    session.execute(statement.on_conflict_do_update(index_elements=["project", "day"], set_=sums))


def list_usage(
    session: Session, project: str, *, since: date, until: date, running: Sequence[AttemptUse], now: datetime
) -> list[DayUsage]:
    """What a project used on each day from `since` to `until`, both inclusive; days without anything are left out.

    Args:
        running: attempts of the project that have not ended, which count as far as they are.
    """
    days: dict[date, DayUsage] = {}
    jobs: dict[date, set[str]] = {}
    records = sa.select(UsageRecord.day, UsageRecord.device, UsageRecord.job_id, UsageRecord.seconds).where(
        UsageRecord.project == project, UsageRecord.day.between(since, until)
    )
    used = [(row.day, row.device, row.job_id, row.seconds) for row in session.execute(records)]
    used += [
        (day, use.device, use.job_id, seconds)
        for use in running
        for day, seconds in use.by_day(now)
        if since <= day <= until
    ]
    for day, device, job_id, seconds in used:
        usage = days.setdefault(day, DayUsage(day))
        usage.add(device, seconds)
        usage.attempts += 1
        jobs.setdefault(day, set()).add(job_id)
    for day, ids in jobs.items():
        days[day].jobs = len(ids)
    stored = sa.select(StorageDay.day, StorageDay.bytes).where(
        StorageDay.project == project, StorageDay.day.between(since, until)
    )
    for day, size in session.execute(stored):
        days.setdefault(day, DayUsage(day)).storage_bytes = size
    chats = sa.select(ChatDay).where(ChatDay.project == project, ChatDay.day.between(since, until))
    for row in session.scalars(chats):
        usage = days.setdefault(row.day, DayUsage(row.day))
        usage.chat_requests = row.requests
        usage.chat_prompt_tokens, usage.chat_completion_tokens = row.prompt_tokens, row.completion_tokens
    return [days[day] for day in sorted(days)]
