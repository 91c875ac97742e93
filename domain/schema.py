"""The schema of the database: bring it to this version, and refuse a database that cannot have it."""

from functools import cache
from pathlib import Path
from typing import Final

import alembic.command
import alembic.config
import sqlalchemy as sa
import structlog
from alembic.script import ScriptDirectory

from domain.connections import KIND_OPTION, create_engine_for
from domain.database_errors import (
    SENTENCES,
    DatabaseFault,
    DatabaseUnavailable,
    translating_database_errors,
)
from domain.db import Database
from domain.generations import GENERATION, list_older_processes, read_generation, record_generation
from domain.settings import Settings

# The key of an advisory lock, any number: two processes that start at once migrate one after the other.
_MIGRATION_LOCK: Final = 0x706F636C


_log = structlog.get_logger(__name__)


class DatabaseRefused(Exception):
    """This version cannot use the database; the message says what to do, and names POCL_DATABASE_URL."""


def upgrade(settings: Settings, *, contract: bool = True) -> None:
    """Bring the database and `home` to the newest version, making `home` and an SQLite file where there is none.

    Safe to call from several processes at once, and again. A schema of the next generation, with which this code
    works, is left as it is.

    Args:
        contract: also take away what only the generation before this one needs.

    Raises:
        DatabaseRefused: a newer version has changed the schema, the database cannot hold it, or processes run that
            would not work with it.
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
            present = _revisions(connection)
            if _is_of_next_generation(connection, present):
                return
            target = _target(present, contract=contract)
            _refuse_running(connection, contract=contract and target != _target(present, contract=False))
            config = alembic.config.Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
            alembic.command.upgrade(config, target)
            record_generation(connection)
            # Still under the lock: one process renames, and the others find it done.
            _rename_former_artifact_root(settings)
    finally:
        engine.dispose()


def create_if_missing(settings: Settings) -> None:
    """Make the schema where there is none at all; one of another version stays as it is.

    Raises:
        DatabaseRefused, DatabaseUnavailable, OSError: see :func:`upgrade`.
    """
    url = sa.make_url(settings.database_url)
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        upgrade(settings)
        return
    database = Database(settings.database_url)
    try:
        with database.transaction(write=False) as session:
            is_empty = not _revisions(session.connection())
    finally:
        database.close()
    if is_empty:
        upgrade(settings)


def check_database(database: Database) -> None:
    """Refuse a database that this version can never use, when a process starts.

    One that is away, or whose schema is older, may be well in a while: that is no reason to refuse it.

    Raises:
        DatabaseRefused: a newer version has changed the schema, or the database cannot hold it.
        DatabaseUnavailable: it is not known, since the database is at fault.
    """
    with database.transaction(write=False) as session:
        _refuse_unusable(session.connection())
        _is_of_next_generation(session.connection(), _revisions(session.connection()))


def check_ready(database: Database) -> None:
    """
    Raises:
        DatabaseUnavailable: the database takes no writes, or lacks a migration of this version.
    """
    database.check_writable()
    with database.transaction(write=False) as session:
        present = _revisions(session.connection())
    # A schema that is too new is refused when a process starts: one that still runs shall not end a rolling upgrade.
    known = _known_revisions()
    if present <= set(known) and _target(present, contract=False) not in present | _before(present):
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


def _is_of_next_generation(connection: sa.Connection, present: set[str]) -> bool:
    """Whether the next generation has changed the schema, which this code works with.

    Raises:
        DatabaseRefused: the schema is newer than that.
    """
    unknown = present - set(_known_revisions())
    if not unknown:
        return False
    generation = read_generation(connection)
    if generation != GENERATION + 1:
        raise DatabaseRefused(
            f"POCL_DATABASE_URL: the schema of the database is revision {', '.join(sorted(unknown))} (generation"
            f" {generation}), and this version knows none after {newest_revision()} (generation {GENERATION}): run"
            " the newer version that made it, or the one before that, or restore a backup."
        )
    _log.warning("schema_of_next_generation", revision=sorted(unknown), hint="Upgrade this process too, soon.")
    return True


def _refuse_running(connection: sa.Connection, *, contract: bool) -> None:
    """Refuse a migration after which processes that run would not work.

    Args:
        contract: whether what the generation before needs is to be taken away.
    """
    older = list_older_processes(connection, than=GENERATION if contract else GENERATION - 1)
    if older:
        names = ", ".join(process.name for process in older[:5])
        raise DatabaseRefused(
            f"POCL_DATABASE_URL: {len(older)} workers and schedulers of an older version run, which would not work"
            f" with the new schema: {names}. Upgrade or stop them first, and wait three minutes where one was killed."
        )


def newest_revision() -> str:
    """The newest revision of the schema that this version has."""
    return _known_revisions()[-1]


@cache
def _known_revisions() -> tuple[str, ...]:
    """All revisions that this version has, in their order."""
    return tuple(reversed([script.revision for script in _scripts().walk_revisions()]))


@cache
def _expanded_revision() -> str:
    """The newest revision with which the code of the generation before still works."""
    scripts, last = _scripts(), ""
    for revision in _known_revisions():
        if getattr(scripts.get_revision(revision).module, "contracts_generation", None) == GENERATION:
            break
        last = revision
    return last


def _target(present: set[str], *, contract: bool) -> str:
    """The revision to bring a database to that has these."""
    expanded = _expanded_revision()
    return newest_revision() if contract or expanded in _before(present) else expanded


def _before(present: set[str]) -> set[str]:
    """The revisions before those that a database has."""
    known = _known_revisions()
    return {revision for each in present & set(known) for revision in known[: known.index(each)]}


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(_migrations()))


def _rename_former_artifact_root(settings: Settings) -> None:
    """Give the artifact store of an older version its present name. Rows hold keys relative to the store."""
    former, present = settings.home / "artefacts", settings.home / "artifacts"
    if settings.artifact_root == present and former.is_dir() and not present.exists():
        former.rename(present)


def _migrations() -> Path:
    # Beside this package, in a checkout and in an installation alike. By its name a package of the working directory
    # could be found, as a Django project has one.
    return Path(__file__).resolve().parents[1] / "migrations"
