"""Chat requests: admit, claim, renew, settle, cancel, expire. No function commits.

    queued -> running -> succeeded | failed | cancelled
    queued -> failed (no worker was free in time) | cancelled

Every lease and deadline is compared by the database's clock. A request is claimed once: one whose worker is lost fails,
since the client that waits for it can ask again.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session

from domain.chat.models import LIVE, ChatRequest, ChatStatus
from domain.db import db_now
from domain.errors import LostLease, QuotaExceeded, Unavailable
from domain.ids import new_id
from domain.jobs.fleet import live_fleet
from domain.projects.repository import lock_project_of_key
from domain.usage.repository import ChatUse, record_chat
from pocl.chat.protocol import AnswerFinished, ChatQuestion, FinishReason
from pocl.errors import Fault

NO_WORKER_FREE: Final = "no_worker_free"
WORKER_LOST: Final = "worker_lost"
_EXPIRE_BATCH_SIZE: Final = 200


class TooManyChats(QuotaExceeded):
    """The project has as many conversations being answered as it may at once: wait for one of them."""

    code = "too_many_chats"


class ChatQueueFull(Unavailable):
    """As many conversations wait for workers as may at once: try again later."""

    code = "chat_queue_full"


@dataclass(frozen=True)
class ChatLimits:
    """How many chat requests there may be, and how long they may wait."""

    in_all: int
    per_project: int
    wait_seconds: float
    """How long a request waits for a worker."""


@dataclass(frozen=True)
class ChatFailure:
    """Why a request failed."""

    code: str
    message: str
    fault: Fault


@dataclass(frozen=True)
class ChatClaim:
    """The lease of a worker on a request."""

    id: str
    project: str
    token: int
    """The fencing token."""
    question: ChatQuestion


@dataclass(frozen=True)
class ChatSnapshot:
    """A request at one moment."""

    id: str
    project: str
    status: ChatStatus
    text: str
    tokens: int
    prompt_tokens: int | None
    finish_reason: FinishReason | None
    warnings: tuple[str, ...]
    failure: ChatFailure | None
    created_at: datetime
    overdue: bool
    """Whether nobody answers it any more: no worker has claimed it in time, or its worker is lost."""

    @property
    def ended(self) -> bool:
        """Whether nothing changes any more."""
        return self.status not in LIVE


def add_request(session: Session, project: str, question: ChatQuestion, limits: ChatLimits) -> ChatRequest:
    """Queue a conversation; it gets an id of its own in place of that of `question`.

    Raises:
        TooManyChats, ChatQueueFull: there are as many as may be.
        Unauthenticated: the project was deleted.
    """
    # The lock lets one request of the project count at a time.
    lock_project_of_key(session, project)
    live = sa.select(sa.func.count()).where(ChatRequest.status.in_(LIVE))
    if (session.scalar(live.where(ChatRequest.project == project)) or 0) >= limits.per_project:
        raise TooManyChats
    if (session.scalar(live) or 0) >= limits.in_all:
        raise ChatQueueFull
    chat_id = new_id("chat")
    waits_until = session.scalars(sa.select(db_now(limits.wait_seconds))).one()
    question = question.model_copy(update={"id": chat_id})
    row = ChatRequest(id=chat_id, project=project, question=question.model_dump(mode="json"), waits_until=waits_until)
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def count_waiting(session: Session, *, limit: int) -> int:
    """The number of requests that a worker might claim now, counted as far as `limit`."""
    waiting = sa.select(ChatRequest.id).where(*_claimable()).limit(limit)
    return session.scalar(sa.select(sa.func.count()).select_from(waiting.subquery())) or 0


def claim_next(session: Session, *, worker: str, lease_seconds: float) -> ChatClaim | None:
    """Claim the request that has waited the longest; null where none waits."""
    statement = sa.select(ChatRequest).where(*_claimable()).order_by(ChatRequest.created_at, ChatRequest.id).limit(1)
    row = session.scalars(
        statement.with_for_update(skip_locked=True), execution_options={"populate_existing": True}
    ).one_or_none()
    if row is None:
        return None
    row.status, row.lease_owner, row.lease_token = ChatStatus.RUNNING, worker[:200], row.lease_token + 1
    row.lease_expires_at = session.scalars(sa.select(db_now(lease_seconds))).one()
    session.flush()
    return ChatClaim(row.id, row.project, row.lease_token, ChatQuestion.model_validate(row.question))


def renew(session: Session, claim: ChatClaim, *, text: str, tokens: int, lease_seconds: float) -> bool:
    """Renew the lease, and write what the answer says so far; whether the answer is to be cancelled.

    Raises:
        LostLease: the request has ended, or is deleted.
    """
    changes = {"text": text, "tokens": tokens, "lease_expires_at": db_now(lease_seconds)}
    statement = _held_by(claim).values(changes).returning(ChatRequest.cancel_requested)
    cancelled = session.execute(statement, execution_options={"synchronize_session": False}).scalar_one_or_none()
    if cancelled is None:
        raise LostLease
    return cancelled


def settle(session: Session, claim: ChatClaim, outcome: AnswerFinished | ChatFailure | None) -> None:
    """End the request: with its answer, with a failure, or (null) as cancelled. Its tokens count as used.

    Raises:
        LostLease: the request has ended already, or is deleted.
    """
    changes: dict[str, Any] = {"ended_at": db_now(), "lease_expires_at": None}
    match outcome:
        case AnswerFinished():
            changes |= {
                "status": ChatStatus.SUCCEEDED,
                "text": outcome.text,
                "tokens": outcome.completion_tokens,
                "prompt_tokens": outcome.prompt_tokens,
                "finish_reason": outcome.finish_reason,
                "warnings": list(outcome.warnings),
            }
        case ChatFailure():
            changes |= {"status": ChatStatus.FAILED, "error": asdict(outcome)}
        case None:
            changes |= {"status": ChatStatus.CANCELLED}
    statement = _held_by(claim).values(changes).returning(ChatRequest)
    options = {"synchronize_session": False, "populate_existing": True}
    row = session.scalars(statement, execution_options=options).one_or_none()
    if row is None:
        raise LostLease
    use = ChatUse(prompt_tokens=row.prompt_tokens or 0, completion_tokens=row.tokens)
    record_chat(session, claim.project, session.scalars(sa.select(db_now())).one().date(), use)


def cancel(session: Session, chat_id: str) -> None:
    """Cancel a request: one that waits at once, one that is being answered with the next write of its worker."""
    session.execute(
        sa.update(ChatRequest)
        .where(ChatRequest.id == chat_id, ChatRequest.status == ChatStatus.QUEUED)
        .values(status=ChatStatus.CANCELLED, ended_at=db_now(), cancel_requested=True)
    )
    session.execute(
        sa.update(ChatRequest)
        .where(ChatRequest.id == chat_id, ChatRequest.status == ChatStatus.RUNNING)
        .values(cancel_requested=True)
    )


def snapshots(session: Session, chat_ids: Collection[str]) -> Mapping[str, ChatSnapshot]:
    """The requests of these ids, those that are deleted left out."""
    statement = sa.select(ChatRequest, sa.or_(*_overdue())).where(ChatRequest.id.in_(chat_ids))
    rows = session.execute(statement, execution_options={"populate_existing": True})
    return {row.id: _snapshot(row, overdue=bool(overdue)) for row, overdue in rows}


def expire(session: Session, *, worker_seconds: float, chat_ids: Collection[str] | None = None) -> list[str]:
    """Fail requests that no worker has claimed in time, and those whose worker is lost. Returns their ids.

    Args:
        worker_seconds: a worker that has been silent for longer does not count.
        chat_ids: only these requests; null: any, at most 200.
    """
    statement = sa.select(ChatRequest).where(sa.or_(*_overdue())).limit(_EXPIRE_BATCH_SIZE)
    if chat_ids is not None:
        statement = statement.where(ChatRequest.id.in_(chat_ids))
    rows = session.scalars(
        statement.with_for_update(skip_locked=True), execution_options={"populate_existing": True}
    ).all()
    now = session.scalars(sa.select(db_now())).one()
    for row in rows:
        if row.status is ChatStatus.QUEUED:
            failure = ChatFailure(NO_WORKER_FREE, _explain_wait(session, worker_seconds), "capacity")
        else:
            failure = ChatFailure(WORKER_LOST, "The worker that was answering is lost: ask again.", "system")
        row.status, row.error, row.ended_at, row.lease_expires_at = ChatStatus.FAILED, asdict(failure), now, None
    session.flush()
    return [row.id for row in rows]


def delete_ended(session: Session, *, older_than_seconds: float) -> int:
    """Delete requests, with conversation and answer, that ended so long ago; the number of them."""
    old = sa.delete(ChatRequest).where(ChatRequest.ended_at < db_now(-older_than_seconds))
    return len(session.execute(old.returning(ChatRequest.id)).all())


def _claimable() -> tuple[sa.ColumnElement[bool], ...]:
    return (ChatRequest.status == ChatStatus.QUEUED, ChatRequest.waits_until >= db_now())


def _overdue() -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    """Requests that no worker has claimed in time, and those whose worker is lost."""
    unclaimed = sa.and_(ChatRequest.status == ChatStatus.QUEUED, ChatRequest.waits_until < db_now())
    lost = sa.and_(ChatRequest.status == ChatStatus.RUNNING, ChatRequest.lease_expires_at < db_now())
    return unclaimed, lost


def _held_by(claim: ChatClaim) -> sa.Update:
    return sa.update(ChatRequest).where(
        ChatRequest.id == claim.id,
        ChatRequest.lease_token == claim.token,
        ChatRequest.status == ChatStatus.RUNNING,
    )


def _explain_wait(session: Session, worker_seconds: float) -> str:
    fleet = live_fleet(session, worker_seconds)
    if not fleet.workers:
        return "No worker was free in time: none is running, or all are drained."
    if not fleet.accepting:
        return "No worker was free in time: all that are running are quarantined."
    if fleet.woken != "ok":
        return "No worker was free in time: no scheduler wakes them, or the broker does not answer."
    return f"No worker was free in time: the {fleet.accepting} that are running work on jobs or answer others."


def _snapshot(row: ChatRequest, *, overdue: bool) -> ChatSnapshot:
    error: Any = row.error
    return ChatSnapshot(
        id=row.id,
        project=row.project,
        status=row.status,
        text=row.text,
        tokens=row.tokens,
        prompt_tokens=row.prompt_tokens,
        finish_reason=row.finish_reason,
        warnings=tuple(row.warnings),
        failure=None if error is None else ChatFailure(**error),
        created_at=row.created_at,
        overdue=overdue,
    )
