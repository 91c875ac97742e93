"""What the engine counted when it made tokens of a job's data sets."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    json = sa.JSON().with_variant(JSONB(), "postgresql")
    op.add_column("jobs", sa.Column("encodings", json, nullable=False, server_default="[]"))


def downgrade() -> None:
    op.drop_column("jobs", "encodings")
