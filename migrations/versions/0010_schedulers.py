"""Schedulers, and whether they reach the broker."""

import sqlalchemy as sa
from alembic import op

from domain.db import UtcDateTime

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_table(
        "schedulers",
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("reaches_broker", sa.Boolean(), nullable=False),
        sa.Column("seen_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_schedulers"),
    )


def downgrade() -> None:
    op.drop_table("schedulers")
