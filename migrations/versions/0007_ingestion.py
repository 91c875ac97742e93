"""How the file of a data set was read, and how many of its samples have no answer."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0007"
down_revision = "0006"

JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    # Of data sets that are there already, every sample has an answer, and nothing is known of the file.
    op.add_column("datasets", sa.Column("prompts", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("datasets", sa.Column("ingestion", JSON))


def downgrade() -> None:
    op.execute("ALTER TABLE datasets DROP COLUMN ingestion")
    op.execute("ALTER TABLE datasets DROP COLUMN prompts")
