"""Jobs and what they bring about, data sets, checkpoints."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None

# SQLite keeps microseconds since 1970.
MOMENT = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")
JSON = sa.JSON().with_variant(JSONB(), "postgresql")

JOB_STATUS = (
    "queued",
    "preparing",
    "running",
    "pausing",
    "paused",
    "recovering",
    "cancelling",
    "cancelled",
    "succeeded",
    "failed",
)
STAGE_STATUS = ("pending", "running", "succeeded", "failed", "cancelled")
ATTEMPT_END = ("succeeded", "failed", "cancelled", "released", "crashed", "lost")
CHECKPOINT_KIND = ("training", "stage", "best", "final")


def upgrade() -> None:
    _create_datasets()
    _create_jobs()
    _create_checkpoints()
    _create_job_history()
    _create_job_results()


def downgrade() -> None:
    for table in (
        "job_artefacts",
        "job_evaluations",
        "job_metrics",
        "job_stages",
        "job_attempts",
        "job_events",
        "checkpoints",
        "jobs",
        "datasets",
    ):
        op.drop_table(table)


def _create_datasets() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("store_key", sa.String(255), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_datasets"),
        sa.UniqueConstraint("store_key", name="uq_datasets_store_key"),
    )
    op.create_index("ix_datasets_project", "datasets", ["project", "id"])


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("name", sa.String(200)),
        sa.Column("labels", JSON, nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("spec", JSON, nullable=False),
        sa.Column("resolved", JSON, nullable=False),
        sa.Column("device", sa.String(16), nullable=False),
        sa.Column("status", _enumeration("jobstatus", JOB_STATUS), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("event_seq", sa.Integer(), nullable=False),
        sa.Column("end_reason", JSON),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("attempts_spent", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(200)),
        sa.Column("lease_token", sa.Integer()),
        sa.Column("lease_expires_at", MOMENT),
        sa.Column("events_offset", sa.BigInteger(), nullable=False),
        sa.Column("phase", sa.String(32)),
        sa.Column("phase_done", sa.BigInteger()),
        sa.Column("phase_total", sa.BigInteger()),
        sa.Column("phase_unit", sa.String(16)),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("total_steps", sa.Integer(), nullable=False),
        sa.Column("stage", sa.Integer()),
        sa.Column("stages", sa.Integer(), nullable=False),
        sa.Column("percent", sa.Double(), nullable=False),
        sa.Column("tokens_seen", sa.BigInteger(), nullable=False),
        sa.Column("tokens_per_second", sa.Double()),
        sa.Column("eta_seconds", sa.Double()),
        sa.Column("progress_at", MOMENT),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.Column("started_at", MOMENT),
        sa.Column("finished_at", MOMENT),
        sa.Column("cancel_requested_at", MOMENT),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_queue", "jobs", ["status", "priority", "created_at"])
    op.create_index("ix_jobs_lease", "jobs", ["lease_expires_at"])
    op.create_index("ix_jobs_project", "jobs", ["project", "id"])


def _create_checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("kind", _enumeration("checkpointkind", CHECKPOINT_KIND), nullable=False),
        sa.Column("stage", sa.Integer()),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("store_key", sa.String(255), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("manifest_sha256", sa.String(64), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        _job_foreign_key("checkpoints"),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoints"),
        sa.UniqueConstraint("store_key", name="uq_checkpoints_store_key"),
    )
    op.create_index("ix_checkpoints_job", "checkpoints", ["job_id", "kind", "step"])
    op.create_index("ix_checkpoints_project", "checkpoints", ["project", "id"])


def _create_job_history() -> None:
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("data", JSON, nullable=False),
        _job_foreign_key("job_events"),
        sa.PrimaryKeyConstraint("job_id", "seq", name="pk_job_events"),
    )
    op.create_table(
        "job_attempts",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(200), nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("ended_at", MOMENT),
        sa.Column("end", _enumeration("attemptend", ATTEMPT_END)),
        sa.Column("end_reason", JSON),
        sa.Column("resumed_from_step", sa.Integer()),
        sa.Column("log_tail", sa.Text(), nullable=False),
        _job_foreign_key("job_attempts"),
        sa.PrimaryKeyConstraint("job_id", "number", name="pk_job_attempts"),
    )


def _create_job_results() -> None:
    op.create_table(
        "job_stages",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("temperature", sa.Double(), nullable=False),
        sa.Column("kd_weight", sa.Double(), nullable=False),
        sa.Column("epochs", sa.Integer(), nullable=False),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("first_step", sa.Integer(), nullable=False),
        sa.Column("status", _enumeration("stagestatus", STAGE_STATUS), nullable=False),
        sa.Column("started_at", MOMENT),
        sa.Column("finished_at", MOMENT),
        sa.Column("evaluation", JSON),
        _job_foreign_key("job_stages"),
        sa.PrimaryKeyConstraint("job_id", "index", name="pk_job_stages"),
    )
    op.create_table(
        "job_metrics",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        _job_foreign_key("job_metrics"),
        sa.PrimaryKeyConstraint("job_id", "name", "step", name="pk_job_metrics"),
    )
    op.create_table(
        "job_evaluations",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(16), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("stage", sa.Integer()),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("rouge_l", sa.Double(), nullable=False),
        sa.Column("exact_match", sa.Double(), nullable=False),
        sa.Column("cross_entropy", sa.Double(), nullable=False),
        sa.Column("divergence", sa.Double()),
        _job_foreign_key("job_evaluations"),
        sa.PrimaryKeyConstraint("job_id", "subject", "step", name="pk_job_evaluations"),
    )
    op.create_table(
        "job_artefacts",
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("store_key", sa.String(255), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        _job_foreign_key("job_artefacts"),
        sa.PrimaryKeyConstraint("job_id", "kind", name="pk_job_artefacts"),
    )


def _enumeration(name: str, values: tuple[str, ...]) -> sa.Enum:
    return sa.Enum(*values, name=name, native_enum=False, create_constraint=True, length=16)


def _job_foreign_key(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=f"fk_{table}_job_id", ondelete="CASCADE")
