"""Trackers: which ones a job has, what each was sent, and which ones a scheduler can reach."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from domain.db import UtcDateTime

revision = "0025"
down_revision = "0024"


def _json() -> sa.types.TypeEngine[Any]:
    return sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("trackers", _json()))
    op.add_column("schedulers", sa.Column("trackers", _json(), nullable=False, server_default="[]"))
    op.create_table(
        "job_trackers",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("channel", sa.String(16), nullable=False),
        sa.Column("options", _json(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("pending", sa.Boolean(), nullable=False),
        sa.Column("due_at", UtcDateTime(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("failing_since", UtcDateTime()),
        sa.Column("problem", _json()),
        sa.Column("run_id", sa.String(200)),
        sa.Column("run_url", sa.String(1000)),
        sa.Column("last_steps", _json(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "kind", name="pk_job_trackers"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_trackers_job_id_jobs", ondelete="CASCADE"),
    )
    op.create_index("ix_job_trackers_pending", "job_trackers", ["pending", "channel"])


def downgrade() -> None:
    op.drop_table("job_trackers")
    op.drop_column("schedulers", "trackers")
    op.drop_column("jobs", "trackers")
