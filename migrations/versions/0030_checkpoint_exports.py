"""Exports: checkpoints that are written as GGUF after the fact."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from domain.db import UtcDateTime

revision = "0030"
down_revision = "0029"


def upgrade() -> None:
    json_type = sa.JSON().with_variant(JSONB(), "postgresql")
    op.create_table(
        "checkpoint_exports",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("checkpoint_id", sa.String(64), nullable=False),
        sa.Column("format", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("not_before", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.Column("lease_token", sa.Integer(), nullable=False),
        sa.Column("lease_expires_at", UtcDateTime()),
        sa.Column("error", json_type),
        sa.Column("store_key", sa.String(255)),
        sa.Column("size_bytes", sa.BigInteger()),
        sa.Column("manifest_sha256", sa.String(64)),
        sa.Column("notes", json_type),
        sa.Column("completed_at", UtcDateTime()),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoint_exports"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["checkpoints.id"],
            name="fk_checkpoint_exports_checkpoint_id_checkpoints",
            ondelete="CASCADE",
        ),
        sa.UniqueConstraint("checkpoint_id", "format", name="uq_checkpoint_exports_checkpoint_id_format"),
        sa.UniqueConstraint("store_key", name="uq_checkpoint_exports_store_key"),
    )
    op.create_index("ix_checkpoint_exports_due", "checkpoint_exports", ["state", "not_before"])
    op.create_index("ix_checkpoint_exports_project", "checkpoint_exports", ["project", "state"])
    op.create_index("ix_checkpoint_exports_job", "checkpoint_exports", ["job_id"])


def downgrade() -> None:
    op.drop_table("checkpoint_exports")
