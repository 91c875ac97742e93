"""The rows of webhooks: endpoints of clients, and the messages that are delivered to them."""

from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, JsonType, UtcDateTime, db_now

WebhookStatus = Literal["enabled", "disabled"]
DisabledReason = Literal["by_client", "gone", "failing"]
"""Why an endpoint gets nothing: a client switched it off, it answered 410, or it failed for days."""
DeliveryStatus = Literal["pending", "delivered", "failed"]
DeliveryFailure = Literal["attempts_exhausted", "expired", "backlog_full"]
"""Why a message was given up: the attempts of a day failed, its endpoint was disabled, or too many others waited."""
DeliveryError = Literal[
    "url_not_allowed",
    "name_not_resolved",
    "address_not_allowed",
    "connection_failed",
    "tls_failed",
    "proxy_failed",
    "timed_out",
    "response_invalid",
    "redirected",
    "status_not_2xx",
    "gone",
]
"""Why an attempt failed."""


class WebhookEndpoint(Base):
    """An address of a client that messages are delivered to. It is itself the lease of the process that does."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (Index("ix_webhook_endpoints_project", "project", "id"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project: Mapped[str] = mapped_column(String(64))
    url: Mapped[str] = mapped_column(String(2048))
    """It may hold a secret of the receiver, so it is never logged."""
    description: Mapped[str] = mapped_column(String(200), default="")
    events: Mapped[list[str] | None] = mapped_column(JsonType)
    """The types of messages that the endpoint gets; null: all."""
    labels: Mapped[dict[str, str]] = mapped_column(JsonType, default=dict)
    """Labels that a job must have for the endpoint to hear of it."""
    secret: Mapped[str] = mapped_column(String(100))
    """The secret that messages are signed with, `whsec_...`: in plain text, since a digest signs nothing."""
    former_secret: Mapped[str | None] = mapped_column(String(100))
    """The secret before, with which messages are signed too for a while."""
    former_secret_until: Mapped[datetime | None] = mapped_column(UtcDateTime)

    status: Mapped[WebhookStatus] = mapped_column(String(16), default="enabled")
    disabled_reason: Mapped[DisabledReason | None] = mapped_column(String(16))
    disabled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    failures: Mapped[int] = mapped_column(default=0)
    """Attempts in a row that failed."""
    failing_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the first of them was; null after a success. After days without an attempt the count begins anew."""
    failed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the last attempt failed."""
    delivered_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the last attempt succeeded."""
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Until when the receiver asked to be left alone; null: it did not."""

    lease_token: Mapped[int] = mapped_column(default=0)
    """The fencing token of the newest lease."""
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Until when the holder of that token alone delivers; null: nobody does."""
    served_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the last lease was taken: of several endpoints the one that was served the longest ago comes first."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())


class WebhookDelivery(Base):
    """A message to one endpoint, and the attempts to deliver it."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_endpoint", "endpoint_id", "id"),
        Index("ix_webhook_deliveries_due", "endpoint_id", "next_attempt_at"),
        Index("ix_webhook_deliveries_settled", "settled_at"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The id of the message, which all attempts carry."""
    endpoint_id: Mapped[str] = mapped_column(String(64), ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    type: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str | None] = mapped_column(String(64))
    """The job that the message is about; null for a test message. The job may be deleted by now."""
    body: Mapped[str] = mapped_column(Text)
    """The body that is sent, JSON."""
    status: Mapped[DeliveryStatus] = mapped_column(String(16), default="pending")
    failure: Mapped[DeliveryFailure | None] = mapped_column(String(32))
    """Why the message was given up; null unless it was."""
    attempt_count: Mapped[int] = mapped_column(default=0)
    retries: Mapped[int] = mapped_column(default=0)
    """Failed attempts since the message was written, or since it was to be delivered again: the wait grows by them."""
    attempts: Mapped[list[dict[str, Any]]] = mapped_column(JsonType, default=list)
    """The last attempts, oldest first."""
    next_attempt_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the next attempt is due; null for a message that is delivered or given up."""
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    """After this the message is given up."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    """When the message was written: of one endpoint's messages about a job the order of this is that of the history."""
    settled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the message was delivered or given up."""
