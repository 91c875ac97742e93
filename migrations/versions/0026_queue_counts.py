"""Indexes by which a long queue is counted without its rows, and the jobs are found that succeeded last."""

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"

_QUEUE_ORDER: list[str | sa.TextClause] = ["status", "project", sa.text("priority DESC"), "created_at", "id"]


def upgrade() -> None:
    op.drop_index("ix_jobs_queue", "jobs")
    op.create_index("ix_jobs_queue", "jobs", [*_QUEUE_ORDER, "not_before"])
    op.create_index("ix_jobs_finished", "jobs", ["status", "finished_at"])


def downgrade() -> None:
    op.drop_index("ix_jobs_finished", "jobs")
    op.drop_index("ix_jobs_queue", "jobs")
    op.create_index("ix_jobs_queue", "jobs", _QUEUE_ORDER)
