"""How Alembic reaches the database: over the connection that it is given, or by the settings."""

import sqlalchemy as sa
from alembic import context

import domain.checkpoints.models
import domain.datasets.models
import domain.idempotency.models
import domain.jobs.models
import domain.workers.models  # noqa: F401 - the five fill the metadata
from domain.db import Base, create_engine_for
from domain.settings import Settings


def main() -> None:
    if context.is_offline_mode():
        raise SystemExit("Migrations run against a database: leave out --sql.")
    given: sa.Connection | None = context.config.attributes.get("connection")
    if given is not None:
        migrate(given)
        return
    engine = create_engine_for(Settings().database_url)
    with engine.begin() as connection:
        migrate(connection)
    engine.dispose()


def migrate(connection: sa.Connection) -> None:
    """Run in the transaction that the connection is in: all steps, or none."""
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    context.run_migrations()


main()
