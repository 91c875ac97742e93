"""Projects with their quotas, and API keys."""

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0021"
down_revision = "0020"

# SQLite keeps microseconds since 1970.
MOMENT = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")
JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
OWNED = ("jobs", "datasets", "checkpoints", "usage_records")


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("description", sa.String(200)),
        sa.Column("max_jobs_running", sa.Integer()),
        sa.Column("max_jobs_queued", sa.Integer()),
        sa.Column("max_uploads", sa.Integer()),
        sa.Column("max_storage_bytes", sa.BigInteger()),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_projects"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("token_sha256", sa.String(64), nullable=False),
        sa.Column("previous_sha256", sa.String(64)),
        sa.Column("previous_expires_at", MOMENT),
        sa.Column("expires_at", MOMENT),
        sa.Column("revoked_at", MOMENT),
        sa.Column("last_used_at", MOMENT),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.ForeignKeyConstraint(["project"], ["projects.id"], name="fk_api_keys_project"),
    )
    op.create_index("ix_api_keys_project", "api_keys", ["project", "id"])
    _add_projects()


def _add_projects() -> None:
    """The default project, and one for each name that rows have already."""
    connection = op.get_bind()
    names = {"default"}
    for table in OWNED:
        names |= set(connection.scalars(sa.text(f"SELECT DISTINCT project FROM {table}")))
    now: datetime | int = datetime.now(UTC)
    if connection.dialect.name == "sqlite":
        now = (datetime.now(UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    projects = sa.table("projects", sa.column("id", sa.String()), sa.column("created_at", MOMENT))
    op.bulk_insert(projects, [{"id": name, "created_at": now} for name in sorted(names)])


def downgrade() -> None:
    op.drop_index("ix_api_keys_project", "api_keys")
    op.drop_table("api_keys")
    op.drop_table("projects")
