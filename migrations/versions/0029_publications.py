"""Publications: pushes of students to the Hugging Face Hub, and which schedulers can make them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from domain.db import UtcDateTime

revision = "0029"
down_revision = "0028"


def upgrade() -> None:
    op.add_column("schedulers", sa.Column("publishes", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "publications",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("repo", sa.String(200), nullable=False),
        sa.Column("branch", sa.String(128), nullable=False),
        sa.Column("private", sa.Boolean(), nullable=False),
        sa.Column("checkpoint_id", sa.String(64)),
        sa.Column("store_key", sa.String(255)),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("not_before", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.Column("lease_token", sa.Integer(), nullable=False),
        sa.Column("lease_expires_at", UtcDateTime()),
        sa.Column("error", sa.JSON().with_variant(JSONB(), "postgresql")),
        sa.Column("url", sa.String(1000)),
        sa.Column("commit", sa.String(64)),
        sa.Column("published_at", UtcDateTime()),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", name="pk_publications"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_publications_job_id_jobs", ondelete="CASCADE"),
    )
    op.create_index("ix_publications_due", "publications", ["state", "not_before"])


def downgrade() -> None:
    op.drop_table("publications")
    op.drop_column("schedulers", "publishes")
