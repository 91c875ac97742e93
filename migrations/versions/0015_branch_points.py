"""Where a job branched off, also of its retries, and the warnings of its dry run."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0015"
down_revision = "0014"

_MAX_GENERATIONS = 1000
"""Retries of retries that are followed."""


def upgrade() -> None:
    op.add_column("jobs", sa.Column("branch_point", sa.String(64)))
    json = sa.JSON().with_variant(JSONB(), "postgresql")
    op.add_column("jobs", sa.Column("plan_warnings", json, nullable=False, server_default="[]"))
    connection = op.get_bind()
    connection.execute(sa.text("UPDATE jobs SET branch_point = starts_from WHERE branch_of IS NOT NULL"))
    # A retry of a branch is one too, and so on.
    inherit = sa.text(
        "UPDATE jobs SET branch_point ="
        " (SELECT parent.branch_point FROM jobs AS parent WHERE parent.id = jobs.retry_of)"
        " WHERE branch_point IS NULL AND retry_of IN (SELECT id FROM jobs WHERE branch_point IS NOT NULL)"
    )
    for _ in range(_MAX_GENERATIONS):
        if connection.execute(inherit).rowcount < 1:
            break


def downgrade() -> None:
    op.drop_column("jobs", "plan_warnings")
    op.drop_column("jobs", "branch_point")
