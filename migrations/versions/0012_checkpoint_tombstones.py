"""Pinned and deleted checkpoints, and the bytes that each job has in the artifact store."""

import sqlalchemy as sa
from alembic import op

from domain.db import UtcDateTime

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("checkpoints", sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("stored_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute(
        "UPDATE jobs SET stored_bytes = (SELECT COALESCE(SUM(size_bytes), 0) FROM checkpoints WHERE job_id = jobs.id)"
        " + (SELECT COALESCE(SUM(size_bytes), 0) FROM job_artifacts WHERE job_id = jobs.id)"
    )
    op.create_table(
        "checkpoint_tombstones",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("store_key", sa.String(255), nullable=False),
        sa.Column("reason", sa.String(16), nullable=False),
        sa.Column("deleted_at", UtcDateTime(), nullable=False),
        sa.Column("files_removed", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoint_tombstones"),
        sa.UniqueConstraint("store_key", name="uq_checkpoint_tombstones_store_key"),
    )
    op.create_index("ix_checkpoint_tombstones_pending", "checkpoint_tombstones", ["files_removed", "deleted_at"])


def downgrade() -> None:
    op.drop_table("checkpoint_tombstones")
    op.drop_column("jobs", "stored_bytes")
    op.drop_column("checkpoints", "pinned")
