"""Retries with back-off of jobs that failed by a fault that may pass, and the quarantine of sick workers."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

# SQLite keeps microseconds since 1970.
MOMENT = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")


def _job_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("not_before", MOMENT),
        sa.Column("furthest_step", sa.Integer()),
        sa.Column("progress_token", sa.Integer(), nullable=False, server_default="0"),
    )


def _worker_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("failures", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("quarantined_at", MOMENT),
        sa.Column("quarantine_reason", sa.String(2000)),
        sa.Column("checks_at", MOMENT),
        sa.Column("failed_checks", sa.Integer(), nullable=False, server_default="0"),
    )


def upgrade() -> None:
    for column in _job_columns():
        op.add_column("jobs", column)
    for column in _worker_columns():
        op.add_column("workers", column)
    op.create_index("ix_job_attempts_worker", "job_attempts", ["worker", "ended_at"])


def downgrade() -> None:
    op.drop_index("ix_job_attempts_worker", "job_attempts")
    for column in reversed(_worker_columns()):
        op.drop_column("workers", column.name)
    for column in reversed(_job_columns()):
        op.drop_column("jobs", column.name)
