"""What the history of a job counts instead of keeping: repeated warnings, dropped events, thinned metrics."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0013"
down_revision = "0012"


def _columns() -> tuple[sa.Column[Any], ...]:
    json = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
    return (
        sa.Column("warnings", json, nullable=False, server_default="[]"),
        sa.Column("events_dropped", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("metric_window", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("metrics_thinned_to", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("metrics_dropped", sa.BigInteger(), nullable=False, server_default="0"),
    )


def upgrade() -> None:
    for column in _columns():
        op.add_column("jobs", column)


def downgrade() -> None:
    for column in reversed(_columns()):
        op.drop_column("jobs", column.name)
