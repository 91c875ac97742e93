"""Alembic's environment: migrations run over the connection of the caller, or over one that the settings name."""

import sqlalchemy as sa
from alembic import context

import domain.browser_sessions.models
import domain.chat.models
import domain.checkpoints.models
import domain.datasets.models
import domain.end_counts.models
import domain.exports.models
import domain.generations
import domain.idempotency.models
import domain.jobs.models
import domain.keys.models
import domain.projects.models
import domain.publications.models
import domain.retention.models
import domain.throughput.models
import domain.trackers.models
import domain.usage.models
import domain.webhooks.models
import domain.workers.models  # noqa: F401 - the imports fill the metadata
from domain.connections import create_engine_for
from domain.db import Base
from domain.environment import SettingsInvalid, read_settings
from domain.settings import Settings


def main() -> None:
    if context.is_offline_mode():
        raise SystemExit("Migrations run against a database: leave out --sql.")
    connection: sa.Connection | None = context.config.attributes.get("connection")
    if connection is not None:
        migrate(connection)
        return
    try:
        settings = read_settings(Settings)
    except SettingsInvalid as error:
        raise SystemExit(str(error)) from None
    engine = create_engine_for(settings.database_url)
    with engine.begin() as own_connection:
        migrate(own_connection)
    engine.dispose()


def migrate(connection: sa.Connection) -> None:
    """Run the migrations in the transaction of the connection: all of them, or none."""
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    context.run_migrations()


main()
