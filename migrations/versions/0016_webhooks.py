"""Webhooks: endpoints, deliveries, and the outbox of events that no message was written about yet."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0016"
down_revision = "0015"

# SQLite keeps microseconds since 1970.
MOMENT = sa.DateTime(timezone=True).with_variant(sa.BigInteger(), "sqlite")
JSON = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project", sa.String(64), nullable=False),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("description", sa.String(200), nullable=False),
        sa.Column("events", JSON),
        sa.Column("labels", JSON, nullable=False),
        sa.Column("secret", sa.String(100), nullable=False),
        sa.Column("former_secret", sa.String(100)),
        sa.Column("former_secret_until", MOMENT),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("disabled_reason", sa.String(16)),
        sa.Column("disabled_at", MOMENT),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("failing_since", MOMENT),
        sa.Column("failed_at", MOMENT),
        sa.Column("delivered_at", MOMENT),
        sa.Column("not_before", MOMENT),
        sa.Column("lease_token", sa.Integer(), nullable=False),
        sa.Column("lease_expires_at", MOMENT),
        sa.Column("served_at", MOMENT),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("updated_at", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_endpoints"),
    )
    op.create_index("ix_webhook_endpoints_project", "webhook_endpoints", ["project", "id"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("endpoint_id", sa.String(64), nullable=False),
        sa.Column("type", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(64)),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("failure", sa.String(32)),
        sa.Column("attempt_count", sa.Integer(), nullable=False),
        sa.Column("retries", sa.Integer(), nullable=False),
        sa.Column("attempts", JSON, nullable=False),
        sa.Column("next_attempt_at", MOMENT),
        sa.Column("expires_at", MOMENT, nullable=False),
        sa.Column("created_at", MOMENT, nullable=False),
        sa.Column("settled_at", MOMENT),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_deliveries"),
        sa.ForeignKeyConstraint(
            ["endpoint_id"],
            ["webhook_endpoints.id"],
            name="fk_webhook_deliveries_endpoint_id",
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_webhook_deliveries_endpoint", "webhook_deliveries", ["endpoint_id", "id"])
    op.create_index("ix_webhook_deliveries_due", "webhook_deliveries", ["endpoint_id", "next_attempt_at"])
    op.create_index("ix_webhook_deliveries_settled", "webhook_deliveries", ["settled_at"])
    # No message is written about events of before.
    op.add_column("job_events", sa.Column("in_outbox", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index(
        "ix_job_events_outbox",
        "job_events",
        ["job_id", "seq"],
        postgresql_where=sa.text("in_outbox"),
        sqlite_where=sa.text("in_outbox = 1"),
    )


def downgrade() -> None:
    op.drop_index("ix_job_events_outbox", "job_events")
    op.drop_column("job_events", "in_outbox")
    op.drop_table("webhook_deliveries")
    op.drop_table("webhook_endpoints")
