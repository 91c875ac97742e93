"""Conversations with models: the short queue of requests, and what they used by day."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from domain.db import UtcDateTime

revision = "0028"
down_revision = "0027"


def _json() -> sa.types.TypeEngine[Any]:
    return sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "chat_requests",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("question", _json(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer()),
        sa.Column("finish_reason", sa.String(16)),
        sa.Column("warnings", _json(), nullable=False),
        sa.Column("error", _json()),
        sa.Column("lease_owner", sa.String(200)),
        sa.Column("lease_token", sa.Integer(), nullable=False),
        sa.Column("lease_expires_at", UtcDateTime()),
        sa.Column("waits_until", UtcDateTime(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("ended_at", UtcDateTime()),
        sa.PrimaryKeyConstraint("id", name="pk_chat_requests"),
        sa.ForeignKeyConstraint(
            ["project"], ["projects.id"], name="fk_chat_requests_project_projects", ondelete="CASCADE"
        ),
        sa.CheckConstraint("status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="chatstatus"),
    )
    op.create_index("ix_chat_requests_queue", "chat_requests", ["status", "created_at", "id"])
    op.create_index("ix_chat_requests_project", "chat_requests", ["project", "status"])
    op.create_index("ix_chat_requests_ended", "chat_requests", ["ended_at"])
    op.create_table(
        "chat_days",
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("project", "day", name="pk_chat_days"),
    )


def downgrade() -> None:
    op.drop_table("chat_days")
    op.drop_table("chat_requests")
