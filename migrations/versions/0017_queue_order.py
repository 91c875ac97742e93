"""The index by which a worker finds the first job of each project, and none on what every heartbeat changes."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"

_HAS_LIMIT = sa.text("waits_until IS NOT NULL")


def upgrade() -> None:
    op.drop_index("ix_jobs_queue", "jobs")
    op.drop_index("ix_jobs_lease", "jobs")
    op.create_index("ix_jobs_queue", "jobs", ["status", "project", sa.text("priority DESC"), "created_at", "id"])
    op.create_index(
        "ix_jobs_waits_until", "jobs", ["waits_until"], postgresql_where=_HAS_LIMIT, sqlite_where=_HAS_LIMIT
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_waits_until", "jobs")
    op.drop_index("ix_jobs_queue", "jobs")
    op.create_index("ix_jobs_queue", "jobs", ["status", "priority", "created_at"])
    op.create_index("ix_jobs_lease", "jobs", ["lease_expires_at"])
