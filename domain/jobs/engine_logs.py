"""The log of an attempt's engine: kept in chunks, read from any byte on. No function commits.

Offsets count the bytes of the log of one attempt from its start, as the worker passed it on: with paths and secrets
replaced, in UTF-8. Only the end of a log is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.db import upsert_into
from domain.jobs.leases import Claim
from domain.jobs.models import Job, JobAttempt, JobLog
from domain.jobs.transitions import lock_claimed_job

MAX_CHUNK_BYTES: Final = 16 * 1024
_MAX_CHUNKS_PER_READ: Final = 8


@dataclass(frozen=True)
class LogChunk:
    """Consecutive bytes of a log."""

    start: int
    """The offset of the first byte."""
    content: bytes

    @property
    def end(self) -> int:
        """The offset after the last byte."""
        return self.start + len(self.content)


@dataclass(frozen=True)
class AttemptLogChunk:
    """Consecutive bytes of the log of one attempt."""

    attempt: int
    chunk: LogChunk


@dataclass(frozen=True)
class LogExtent:
    """Which bytes of an attempt's log are kept."""

    first: int
    """The offset of the first byte that is kept."""
    end: int
    """The offset after the last byte so far: the size of the whole log."""


def append_log(session: Session, claim: Claim, chunks: Sequence[LogChunk], *, max_bytes: int) -> None:
    """Add chunks to the log of the attempt, and drop the oldest beyond about `max_bytes`.

    Chunks that are there already change nothing, so that a call may be repeated.

    Raises:
        LostLease: the attempt no longer holds the job.
    """
    if not chunks:
        return
    lock_claimed_job(session, claim.job_id, claim.token)
    added = 0
    for chunk in chunks:
        statement = upsert_into(session.connection(), JobLog).values(
            job_id=claim.job_id, attempt=claim.token, start=chunk.start, size=len(chunk.content), content=chunk.content
        )
        inserted = session.execute(statement.on_conflict_do_nothing().returning(JobLog.start)).all()
        added += len(chunk.content) if inserted else 0
    if not added:
        return
    session.execute(
        sa.delete(JobLog).where(
            JobLog.job_id == claim.job_id,
            JobLog.attempt == claim.token,
            JobLog.start + JobLog.size <= chunks[-1].end - max_bytes,
        )
    )
    # No change that a poll would show: followers of the log alone look at this column.
    session.execute(sa.update(Job).where(Job.id == claim.job_id).values(log_bytes=Job.log_bytes + added))


def log_extent(session: Session, attempt: JobAttempt) -> LogExtent:
    """Which bytes of an attempt's log are kept."""
    chunks = sa.select(JobLog.start, JobLog.size).where(
        JobLog.job_id == attempt.job_id, JobLog.attempt == attempt.number
    )
    first = session.execute(chunks.order_by(JobLog.start).limit(1)).one_or_none()
    last = session.execute(chunks.order_by(JobLog.start.desc()).limit(1)).one_or_none()
    if first is None or last is None:
        # A worker of an older version keeps the end of the log in the row of the attempt.
        return LogExtent(0, len(attempt.log_tail.encode()))
    return LogExtent(first.start, last.start + last.size)


def read_log(session: Session, attempt: JobAttempt, *, offset: int, limit: int) -> LogChunk:
    """The bytes of an attempt's log from `offset` on, `limit` of them at most; empty at the end of the log.

    Where the log was dropped up to a later byte, it begins there. No character is cut at the end.
    """
    extent = log_extent(session, attempt)
    start = min(max(offset, extent.first), extent.end)
    rows = session.scalars(
        sa.select(JobLog)
        .where(
            JobLog.job_id == attempt.job_id,
            JobLog.attempt == attempt.number,
            JobLog.start > start - MAX_CHUNK_BYTES,
            JobLog.start < start + limit,
        )
        .order_by(JobLog.start)
    ).all()
    if rows:
        content, first = b"".join(row.content for row in rows), rows[0].start
    else:
        content, first = attempt.log_tail.encode(), 0
    return LogChunk(start, _without_cut_character(content[start - first :], limit))


def tail_start(session: Session, attempt: JobAttempt, size: int) -> int:
    """The offset of the first line within the last `size` bytes of an attempt's log."""
    extent = log_extent(session, attempt)
    start = max(extent.first, extent.end - size)
    if start == 0:
        return 0
    # A line begins after the end of another, which may be the byte before the tail.
    before = read_log(session, attempt, offset=start - 1, limit=MAX_CHUNK_BYTES)
    line_end = before.content.find(b"\n")
    return start if line_end < 0 else before.start + line_end + 1


def next_log_chunks(session: Session, job_id: str, *, attempt: int, offset: int) -> list[AttemptLogChunk]:
    """The next chunks of a job's log after a position, of this attempt and then of later ones; a few at a time."""
    # The chunk that holds the byte at the position, or ends there.
    begin = (
        sa.select(sa.func.max(JobLog.start))
        .where(JobLog.job_id == job_id, JobLog.attempt == attempt, JobLog.start <= offset)
        .scalar_subquery()
    )
    is_next = sa.or_(
        JobLog.attempt > attempt, sa.and_(JobLog.attempt == attempt, JobLog.start >= sa.func.coalesce(begin, 0))
    )
    rows = session.scalars(
        sa.select(JobLog)
        .where(JobLog.job_id == job_id, is_next)
        .order_by(JobLog.attempt, JobLog.start)
        .limit(_MAX_CHUNKS_PER_READ + 1)
    ).all()
    chunks: list[AttemptLogChunk] = []
    for row in rows:
        done = max(0, offset - row.start) if row.attempt == attempt else 0
        if done < row.size:
            chunks.append(AttemptLogChunk(row.attempt, LogChunk(row.start + done, row.content[done:])))
    return chunks


def _without_cut_character(content: bytes, limit: int) -> bytes:
    """The first `limit` bytes, without the beginning of a character that goes on after them."""
    end = min(limit, len(content))
    # A byte of UTF-8 that continues a character is 10xxxxxx; a character has four bytes at most.
    while end < len(content) and end > max(0, limit - 4) and content[end] & 0xC0 == 0x80:
        end -= 1
    return content[: end or min(limit, len(content))]
