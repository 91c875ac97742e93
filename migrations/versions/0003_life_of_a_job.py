"""Pauses, limits and lineage of jobs, and the workers that take them."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"

# SQLite keeps microseconds since 1970.
MOMENT = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")


def _new_job_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("pause_at", sa.String(16)),
        sa.Column("retry_of", sa.String(64)),
        sa.Column("branch_of", sa.String(64)),
        sa.Column("starts_from", sa.String(64)),
        sa.Column("max_runtime_seconds", sa.Integer()),
        sa.Column("runtime_left_seconds", sa.Double()),
        sa.Column("runs_until", MOMENT),
        sa.Column("max_wait_seconds", sa.Integer()),
        sa.Column("waits_until", MOMENT),
        sa.Column("memory_bytes", sa.BigInteger()),
        sa.Column("eta_low_seconds", sa.Double()),
        sa.Column("eta_high_seconds", sa.Double()),
    )


def upgrade() -> None:
    for column in _new_job_columns():
        op.add_column("jobs", column)
    op.create_index("ix_jobs_starts_from", "jobs", ["starts_from"])
    op.create_table(
        "workers",
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("devices", sa.JSON().with_variant(JSONB(), "postgresql"), nullable=False),
        sa.Column("drain", sa.String(16)),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("seen_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_workers"),
    )


def downgrade() -> None:
    op.drop_table("workers")
    op.drop_index("ix_jobs_starts_from", "jobs")
    for column in reversed(_new_job_columns()):
        op.drop_column("jobs", column.name)
