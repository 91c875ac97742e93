"""What jobs were expected to take, and how fast devices did them."""

import sqlalchemy as sa
from alembic import op

from domain.db import JsonType, UtcDateTime

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("forecast", JsonType))
    op.create_table(
        "throughputs",
        sa.Column("device", sa.String(16), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("size_class", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("jobs", sa.Integer(), nullable=False),
        sa.Column("mean_log", sa.Double(), nullable=False),
        sa.Column("squares", sa.Double(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("device", "name", "size_class", name="pk_throughputs"),
    )


def downgrade() -> None:
    op.drop_table("throughputs")
    op.drop_column("jobs", "forecast")
