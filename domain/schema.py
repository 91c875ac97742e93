"""The schema of the database: bring it to this version, and refuse a database that cannot have it."""

from functools import cache
from pathlib import Path
from typing import Final

import alembic.command
import alembic.config
import sqlalchemy as sa
from alembic.script import ScriptDirectory

from domain.connections import KIND_OPTION, create_engine_for
from domain.database_errors import (
    SENTENCES,
    DatabaseFault,
    DatabaseUnavailable,
    translating_database_errors,
)
from domain.db import Database
from domain.settings import Settings

# The key of an advisory lock, any number: two processes that start at once migrate one after the other.
_MIGRATION_LOCK: Final = 0x706F636C


class DatabaseRefused(Exception):
    """This version cannot use the database; the message says what to do, and names POCL_DATABASE_URL."""


def upgrade(settings: Settings) -> None:
    """Bring the database and `home` to the newest version, making `home` and an SQLite file where there is none.

    Safe to call from several processes at once, and again.

    Raises:
        DatabaseRefused: a newer version has changed the schema, or the database cannot hold it.
        DatabaseUnavailable: the database is at fault.
        OSError: a directory could not be made or renamed; the database is then as it was.
    """
    url = sa.make_url(settings.database_url)
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if url.get_backend_name() == "sqlite":
        Path(str(url.database)).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine_for(settings.database_url)
    try:
        with (
            translating_database_errors(),
            engine.execution_options(**{KIND_OPTION: "migration"}).begin() as connection,
        ):
            _refuse_unusable(connection)
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            _refuse_newer(_revisions(connection))
            config = alembic.config.Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
            alembic.command.upgrade(config, "head")
            # Still under the lock: one process renames, and the others find it done.
            _rename_former_artifact_root(settings)
    finally:
        engine.dispose()


def check_database(database: Database) -> None:
    """Refuse a database that this version can never use, when a process starts.

    One that is away, or whose schema is older, may be well in a while: that is no reason to refuse it.

    Raises:
        DatabaseRefused: a newer version has changed the schema, or the database cannot hold it.
        DatabaseUnavailable: it is not known, since the database is at fault.
    """
    with database.transaction(write=False) as session:
        _refuse_unusable(session.connection())
        _refuse_newer(_revisions(session.connection()))


def check_ready(database: Database) -> None:
    """
    Raises:
        DatabaseUnavailable: the database takes no writes, or lacks a migration of this version.
    """
    database.check_writable()
    with database.transaction(write=False) as session:
        present = _revisions(session.connection())
    newest, known = _known_revisions()
    # A newer schema is refused when a process starts: one that still runs shall not end a rolling upgrade.
    if present != {newest} and present <= known:
        raise DatabaseUnavailable(DatabaseFault.SCHEMA)


def is_for_operator(error: DatabaseUnavailable) -> bool:
    """Whether waiting does not help: a process that starts had better end and say so."""
    return error.fault in (DatabaseFault.REFUSED, DatabaseFault.DAMAGED)


def refusal_sentence(error: DatabaseUnavailable) -> str:
    """One sentence for the operator about a database at fault, with the name of the setting."""
    detail = f" ({error.detail})" if error.detail else ""
    return f"POCL_DATABASE_URL: {SENTENCES[error.fault]}{detail}"


def _refuse_unusable(connection: sa.Connection) -> None:
    if connection.dialect.name != "postgresql":
        return
    encoding, schema = connection.execute(
        sa.select(sa.func.current_setting("server_encoding"), sa.func.current_schema())
    ).one()
    if encoding != "UTF8":
        raise DatabaseRefused(
            f"POCL_DATABASE_URL: the encoding of the database is {encoding}, and must be UTF8: make another by CREATE"
            " DATABASE ... ENCODING 'UTF8' TEMPLATE template0."
        )
    if schema is None:
        raise DatabaseRefused(
            "POCL_DATABASE_URL: the search_path of the database's user names no schema that exists: set one by"
            " ALTER ROLE ... SET search_path = public."
        )


def _revisions(connection: sa.Connection) -> set[str]:
    """The revisions that the database has; empty where it has no schema yet."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return set()
    return set(connection.scalars(sa.text("SELECT version_num FROM alembic_version")))


def _refuse_newer(present: set[str]) -> None:
    newest, known = _known_revisions()
    if unknown := present - known:
        raise DatabaseRefused(
            f"POCL_DATABASE_URL: the schema of the database is revision {', '.join(sorted(unknown))}, and this version"
            f" knows none after {newest}: run the newer version that made it, or restore a backup."
        )


@cache
def _known_revisions() -> tuple[str, frozenset[str]]:
    """The newest revision, and all that this version has."""
    scripts = ScriptDirectory(str(_migrations()))
    newest = scripts.get_current_head()
    assert newest is not None, "there is a first migration"
    return newest, frozenset(script.revision for script in scripts.walk_revisions())


def _rename_former_artifact_root(settings: Settings) -> None:
    """Give the artifact store of an older version its present name. Rows hold keys relative to the store."""
    former, present = settings.home / "artefacts", settings.home / "artifacts"
    if settings.artifact_root == present and former.is_dir() and not present.exists():
        former.rename(present)


def _migrations() -> Path:
    # Beside this package, in a checkout and in an installation alike. By its name a package of the working directory
    # could be found, as a Django project has one.
    return Path(__file__).resolve().parents[1] / "migrations"
