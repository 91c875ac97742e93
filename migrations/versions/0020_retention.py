"""Retention policies of projects and jobs, and the lease of the scheduler that deletes what has expired."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from domain.db import UtcDateTime

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    json = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
    op.add_column("jobs", sa.Column("retention", json))
    op.add_column("jobs", sa.Column("history_deleted_at", UtcDateTime()))
    op.create_index("ix_jobs_retry_of", "jobs", ["retry_of"])
    op.create_index("ix_jobs_branch_of", "jobs", ["branch_of"])
    op.create_table(
        "retention_policies",
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("policy", json, nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("project", name="pk_retention_policies"),
    )
    op.create_table(
        "duty_leases",
        sa.Column("duty", sa.String(64), nullable=False),
        sa.Column("scheduler", sa.String(200), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("duty", name="pk_duty_leases"),
    )


def downgrade() -> None:
    op.drop_table("duty_leases")
    op.drop_table("retention_policies")
    op.drop_index("ix_jobs_branch_of", "jobs")
    op.drop_index("ix_jobs_retry_of", "jobs")
    op.drop_column("jobs", "history_deleted_at")
    op.drop_column("jobs", "retention")
