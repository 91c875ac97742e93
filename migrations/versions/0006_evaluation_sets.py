"""Evaluations on more than the validation samples."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

NAME = "pk_job_evaluations"


def upgrade() -> None:
    op.add_column(
        "job_evaluations", sa.Column("split", sa.String(32), nullable=False, server_default=sa.text("'validation'"))
    )
    _set_primary_key(["job_id", "subject", "split", "step"])
    with op.batch_alter_table("job_evaluations") as table:
        table.alter_column("split", server_default=None)


def downgrade() -> None:
    op.execute("DELETE FROM job_evaluations WHERE split <> 'validation'")
    _set_primary_key(["job_id", "subject", "step"])
    with op.batch_alter_table("job_evaluations") as table:
        table.drop_column("split")


def _set_primary_key(columns: list[str]) -> None:
    # SQLite changes no key: the table is written anew, with its rows. No row refers to one of it.
    with op.batch_alter_table("job_evaluations", recreate="auto") as table:
        table.drop_constraint(NAME, type_="primary")
        table.create_primary_key(NAME, columns)
