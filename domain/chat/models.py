"""The rows of chat requests: a short queue, each row with its conversation, its lease and its answer so far."""

from datetime import datetime
from enum import StrEnum
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, JsonType, UtcDateTime, db_now
from pocl.chat.protocol import FinishReason


class ChatStatus(StrEnum):
    """The state of a chat request."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


LIVE: Final = (ChatStatus.QUEUED, ChatStatus.RUNNING)
"""The states of a request that has not ended."""


class ChatRequest(Base):
    """A conversation that a worker is to answer. The row is deleted minutes after its end."""

    __tablename__ = "chat_requests"
    __table_args__ = (
        Index("ix_chat_requests_queue", "status", "created_at", "id"),
        Index("ix_chat_requests_project", "project", "status"),
        Index("ix_chat_requests_ended", "ended_at"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), ForeignKey("projects.id", ondelete="CASCADE"))
    question: Mapped[dict[str, Any]] = mapped_column(JsonType)
    """The values of a :class:`pocl.chat.protocol.ChatQuestion`, whose model may be a checkpoint by its id."""
    status: Mapped[ChatStatus] = mapped_column(
        sa.Enum(
            ChatStatus,
            native_enum=False,
            create_constraint=True,
            length=16,
            name="chatstatus",
            values_callable=lambda states: [str(state) for state in states],
        ),
        default=ChatStatus.QUEUED,
    )
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    """Whether nobody waits for the answer any more; the worker learns of it with its next write."""

    text: Mapped[str] = mapped_column(Text, default="")
    """What the answer says so far."""
    tokens: Mapped[int] = mapped_column(default=0)
    """The tokens that were generated so far."""
    prompt_tokens: Mapped[int | None]
    """The tokens of the conversation; null before the end of the answer."""
    finish_reason: Mapped[FinishReason | None] = mapped_column(String(16))
    warnings: Mapped[list[str]] = mapped_column(JsonType, default=list)
    error: Mapped[dict[str, str] | None] = mapped_column(JsonType)
    """The values of a :class:`domain.chat.repository.ChatFailure`; null unless the request failed."""

    lease_owner: Mapped[str | None] = mapped_column(String(200))
    """The name of the worker that answers."""
    lease_token: Mapped[int] = mapped_column(default=0)
    """The fencing token of the newest claim, which every write of the worker carries."""
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    waits_until: Mapped[datetime] = mapped_column(UtcDateTime)
    """When the request fails unless a worker has claimed it."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
