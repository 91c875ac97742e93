"""Names as the field spells them: artifacts, and a job's specification as posted and as resolved."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

BRITISH, AMERICAN = "artefact", "artifact"
# In this order, since the second takes the name that the first gives up.
JOB_COLUMNS = (("spec", "posted_spec"), ("resolved", "spec"))


def upgrade() -> None:
    _rename_artifact_table(f"job_{BRITISH}s", f"job_{AMERICAN}s")
    for old, new in JOB_COLUMNS:
        _rename_job_column(old, new)
    _respell(BRITISH, AMERICAN)


def downgrade() -> None:
    _respell(AMERICAN, BRITISH)
    for old, new in reversed(JOB_COLUMNS):
        _rename_job_column(new, old)
    _rename_artifact_table(f"job_{AMERICAN}s", f"job_{BRITISH}s")


def _rename_artifact_table(old: str, new: str) -> None:
    """Rename the table and its constraints; its rows stay."""
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


def _rename_job_column(old: str, new: str) -> None:
    # Both databases know this statement. Alembic would write SQLite's table anew, and to drop the old one would
    # delete every row that refers to a job.
    op.execute(f"ALTER TABLE jobs RENAME COLUMN {old} TO {new}")


def _respell(old: str, new: str) -> None:
    """Respell the type of the event, and the service's own sentences; what clients wrote stays."""
    op.execute(sa.text("UPDATE job_events SET type = :new WHERE type = :old").bindparams(old=old, new=new))
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    for table, column, condition in (
        ("jobs", "end_reason", "TRUE"),
        ("job_attempts", "end_reason", "TRUE"),
        # The reason of an ended job stands in its last change of state as well.
        ("job_events", "data", "type = 'status'"),
    ):
        text = f"CAST({column} AS TEXT)" if is_postgresql else column
        value = f"CAST(REPLACE({text}, :old, :new) AS JSONB)" if is_postgresql else f"REPLACE({text}, :old, :new)"
        statement = sa.text(f"UPDATE {table} SET {column} = {value} WHERE {condition} AND {text} LIKE '%{old}%'")
        op.execute(statement.bindparams(old=old, new=new))
