"""Monitoring: counts of ends, figures of GPUs, an index over live jobs, and the request that made a job."""

import sqlalchemy as sa
from alembic import op

from domain.db import JsonType

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.create_table(
        "end_counts",
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("end", sa.String(16), nullable=False),
        sa.Column("fault", sa.String(16), nullable=False),
        sa.Column("code", sa.String(64), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "end", "fault", "code", name="pk_end_counts"),
    )
    op.add_column("workers", sa.Column("gpu_figures", JsonType, nullable=True))
    op.add_column("jobs", sa.Column("request_id", sa.String(64), nullable=True))
    op.add_column("jobs", sa.Column("traceparent", sa.String(64), nullable=True))
    op.create_index("ix_jobs_figures", "jobs", ["status", "project", "created_at", "not_before"])


def downgrade() -> None:
    op.drop_index("ix_jobs_figures", table_name="jobs")
    op.drop_column("jobs", "traceparent")
    op.drop_column("jobs", "request_id")
    op.drop_column("workers", "gpu_figures")
    op.drop_table("end_counts")
