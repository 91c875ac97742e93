"""Usage of devices and storage by project and day, which outlives the jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

# Attempts that have ended count on the day on which they began. The device of one that could choose was not noted.
_RECORD_ENDED_ATTEMPTS = """
    INSERT INTO usage_records (job_id, attempt, day, project, worker, device, seconds)
    SELECT a.job_id, a.number, {day}, j.project, a.worker, CASE WHEN j.device = 'auto' THEN NULL ELSE j.device END,
           {seconds}
    FROM job_attempts a JOIN jobs j ON j.id = a.job_id
    WHERE a.ended_at IS NOT NULL
"""
_SQLITE = {
    "day": "date(a.started_at / 1000000, 'unixepoch')",
    "seconds": "MAX(0, a.ended_at - a.started_at) / 1000000.0",
}
_POSTGRESQL = {
    "day": "(a.started_at AT TIME ZONE 'UTC')::date",
    "seconds": "GREATEST(0, EXTRACT(EPOCH FROM a.ended_at - a.started_at))",
}


def upgrade() -> None:
    op.add_column("job_attempts", sa.Column("device", sa.String(16)))
    op.create_table(
        "usage_records",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("worker", sa.String(200), nullable=False),
        sa.Column("device", sa.String(16)),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", "attempt", "day", name="pk_usage_records"),
    )
    op.create_index("ix_usage_records_project", "usage_records", ["project", "day"])
    op.create_table(
        "storage_days",
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("project", "day", name="pk_storage_days"),
    )
    words = _POSTGRESQL if op.get_bind().dialect.name == "postgresql" else _SQLITE
    op.execute(_RECORD_ENDED_ATTEMPTS.format(**words))


def downgrade() -> None:
    op.drop_table("storage_days")
    op.drop_index("ix_usage_records_project", "usage_records")
    op.drop_table("usage_records")
    op.drop_column("job_attempts", "device")
