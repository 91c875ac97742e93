"""The generation of the schema, and version and generation of each worker and scheduler."""

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"

_TABLES = ("workers", "schedulers")


def upgrade() -> None:
    op.create_table(
        "schema_state",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_schema_state"),
    )
    for table in _TABLES:
        op.add_column(table, sa.Column("version", sa.String(64)))
        op.add_column(table, sa.Column("generation", sa.Integer()))


def downgrade() -> None:
    for table in _TABLES:
        op.drop_column(table, "generation")
        op.drop_column(table, "version")
    op.drop_table("schema_state")
