"""Names as the field spells them: the table of a job's artifacts."""

from alembic import op

revision = "0005"
down_revision = "0004"

OLD, NEW = "job_artefacts", "job_artifacts"


def upgrade() -> None:
    _rename(OLD, NEW)


def downgrade() -> None:
    _rename(NEW, OLD)


def _rename(old: str, new: str) -> None:
    """Rename a table and its constraints; its rows stay."""
    op.rename_table(old, new)
    if op.get_bind().dialect.name == "postgresql":
        op.execute(f"ALTER TABLE {new} RENAME CONSTRAINT pk_{old} TO pk_{new}")
        op.execute(f"ALTER TABLE {new} RENAME CONSTRAINT fk_{old}_job_id TO fk_{new}_job_id")
        return
    # SQLite renames no constraint: the table is written anew, with its rows.
    with op.batch_alter_table(new, recreate="always") as table:
        table.drop_constraint(f"fk_{old}_job_id", type_="foreignkey")
        table.create_foreign_key(f"fk_{new}_job_id", "jobs", ["job_id"], ["id"], ondelete="CASCADE")
        table.drop_constraint(f"pk_{old}", type_="primary")
        table.create_primary_key(f"pk_{new}", ["job_id", "kind"])
