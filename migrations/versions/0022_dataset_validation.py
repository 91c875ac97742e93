"""Data sets that are read after their upload was answered: their state, and who reads them."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from domain.db import UtcDateTime

revision = "0022"
down_revision = "0021"


def _columns() -> tuple[sa.Column[Any], ...]:
    json = sa.JSON().with_variant(JSONB(), "postgresql")
    return (
        sa.Column("status", sa.String(16), nullable=False, server_default="ready"),
        sa.Column("refusal", json),
        sa.Column("upload", json),
        sa.Column("validations", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("validated_until", UtcDateTime()),
    )


def upgrade() -> None:
    for column in _columns():
        op.add_column("datasets", column)
    op.create_index("ix_datasets_status", "datasets", ["status"])


def downgrade() -> None:
    op.drop_index("ix_datasets_status", "datasets")
    for column in reversed(_columns()):
        op.drop_column("datasets", column.name)
