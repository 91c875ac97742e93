"""Versions of two neighbouring generations work together: what a migration may do, and who is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory

import migrations
from domain.db import Database, db_now
from domain.generations import GENERATION, SchemaState
from domain.jobs.leases import claim_next
from domain.jobs.models import Job
from domain.jobs.states import JobStatus
from domain.schema import DatabaseRefused, check_database, check_ready, newest_revision, upgrade
from domain.settings import Settings
from domain.workers.models import Worker
from domain.workers.repository import register_worker
from tests.support.rows import add_job

DIRECTORY = Path(str(migrations.__file__)).parent
PINNED = json.loads((DIRECTORY / "generations" / f"{GENERATION - 1}.json").read_text())
Schema = Mapping[str, Mapping[str, Mapping[str, Any]]]


def migrate(connection: sa.Connection, revision: str) -> None:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(DIRECTORY))
    command.upgrade(config, revision)


# --- What a migration may do ------------------------------------------------------------------------------


def snapshot(connection: sa.Connection) -> dict[str, Any]:
    """What tables allow and demand, as the database has it."""
    inspector = sa.inspect(connection)
    tables = {}
    for table in inspector.get_table_names():
        columns = {
            column["name"]: {
                "type": str(column["type"].compile(connection.dialect)),
                "nullable": column["nullable"],
                "optional": column["nullable"]
                or column["default"] is not None
                or bool(column.get("autoincrement") is True),
            }
            for column in inspector.get_columns(table)
        }
        unique = {tuple(index["column_names"]) for index in inspector.get_indexes(table) if index["unique"]}
        unique |= {tuple(each["column_names"]) for each in inspector.get_unique_constraints(table)}
        tables[table] = {
            "columns": columns,
            "unique": unique,
            "checks": {(each["name"], each["sqltext"]) for each in inspector.get_check_constraints(table)},
            "foreign": {tuple(each["constrained_columns"]) for each in inspector.get_foreign_keys(table)},
        }
    return tables


def broken(before: Mapping[str, Any], after: Mapping[str, Any], used: Schema) -> list[str]:
    """What code that uses these tables and columns can no longer do once a migration has made `after` of `before`."""
    found = []
    for table, columns in used.items():
        if table not in after:
            found.append(f"{table} is gone")
            continue
        was, now = before[table], after[table]
        for name in columns:
            if name not in now["columns"]:
                found.append(f"{table}.{name} is gone")
            elif now["columns"][name]["type"] != was["columns"][name]["type"]:
                found.append(f"{table}.{name} has another type")
            elif was["columns"][name]["nullable"] and not now["columns"][name]["nullable"]:
                found.append(f"{table}.{name} may no longer be null")
        for name, column in now["columns"].items():
            if name not in columns and not column["optional"] and was["columns"].get(name) != column:
                found.append(f"{table}.{name} must be given")
        for rule in ("unique", "checks", "foreign"):
            found += [f"{table} has a new rule: {rule}" for _ in now[rule] - was[rule]]
    return found


def test_no_migration_takes_away_what_the_generation_before_uses(engine: sa.Engine) -> None:
    scripts = ScriptDirectory(str(DIRECTORY))
    later = [script for script in reversed(list(scripts.walk_revisions())) if script.revision > PINNED["revision"]]
    with engine.begin() as connection:
        migrate(connection, PINNED["revision"])
        for script in later:
            before = snapshot(connection)
            migrate(connection, script.revision)
            if getattr(script.module, "contracts_generation", None) == GENERATION:
                # It is run by `migrate --contract`, once no process of the generation before runs.
                continue
            assert broken(before, snapshot(connection), PINNED["tables"]) == [], script.revision


BREAKING: dict[str, tuple[Callable[[Operations], object], str]] = {
    "a column is dropped": (lambda op: op.drop_column("jobs", "percent"), "jobs.percent is gone"),
    "a column is renamed": (lambda op: rename(op, "jobs", "percent", "share"), "jobs.percent is gone"),
    "a table is dropped": (lambda op: op.drop_table("duty_leases"), "duty_leases is gone"),
    "a column is tightened": (
        lambda op: alter(op, "jobs", "eta_seconds", nullable=False),
        "jobs.eta_seconds may no longer be null",
    ),
    "a column has another type": (
        lambda op: alter(op, "jobs", "percent", type_=sa.String(8), postgresql_using="percent::text"),
        "jobs.percent has another type",
    ),
    "a new column must be given": (
        lambda op: op.add_column("schedulers", sa.Column("host", sa.String(8), nullable=False)),
        "schedulers.host must be given",
    ),
    "values become unique": (
        lambda op: op.create_index("ix_new", "jobs", ["name"], unique=True),
        "jobs has a new rule: unique",
    ),
}


def rename(op: Operations, table: str, column: str, name: str) -> None:
    with op.batch_alter_table(table) as batch:
        batch.alter_column(column, new_column_name=name)


def alter(op: Operations, table: str, column: str, **changes: Any) -> None:
    with op.batch_alter_table(table) as batch:
        batch.alter_column(column, **changes)


def test_each_kind_of_breaking_change_is_noticed(engine: sa.Engine) -> None:
    for what, (change, sentence) in BREAKING.items():
        with engine.connect() as connection:
            migrate(connection, PINNED["revision"])
            before = snapshot(connection)
            change(Operations(MigrationContext.configure(connection)))
            assert sentence in broken(before, snapshot(connection), PINNED["tables"]), what
            connection.rollback()


# --- Who is refused ---------------------------------------------------------------------------------------


def pretend(engine: sa.Engine, *, generation: int, revision: str) -> None:
    """Have the database as a later version leaves it."""
    with engine.begin() as connection:
        connection.execute(sa.update(SchemaState).values(generation=generation))
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})


def test_code_works_with_the_schema_of_the_next_generation_and_refuses_later_ones(
    engine: sa.Engine, settings: Settings
) -> None:
    upgrade(settings)
    database = Database(settings.database_url)
    try:
        check_database(database)
        pretend(engine, generation=GENERATION + 1, revision="9001")
        check_database(database)
        check_ready(database)
        upgrade(settings)
        pretend(engine, generation=GENERATION + 2, revision="9002")
        sentence = rf"9002 \(generation {GENERATION + 2}\).*run the newer version"
        with pytest.raises(DatabaseRefused, match=sentence):
            check_database(database)
        with pytest.raises(DatabaseRefused, match=sentence):
            upgrade(settings)
        # One that runs already goes on.
        check_ready(database)
    finally:
        database.close()


@pytest.mark.parametrize("contract", [False, True])
def test_schema_is_not_changed_under_processes_that_would_not_work_with_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, contract: bool
) -> None:
    upgrade(settings)
    database = Database(settings.database_url)
    try:
        with database.transaction(write=True) as session:
            register_worker(session, "before", [])
            session.execute(sa.update(Worker).values(generation=GENERATION - 1))
        upgrade(settings)
        # The next release; or a contract step of this one, that is still to be taken.
        monkeypatch.setattr("domain.schema.GENERATION", GENERATION if contract else GENERATION + 1)
        monkeypatch.setattr("domain.schema._target", pending_contract_step)
        with pytest.raises(DatabaseRefused, match=r"1 workers and schedulers of an older version run.*: before\."):
            upgrade(settings, contract=contract)
        with database.transaction(write=True) as session:
            session.execute(sa.update(Worker).values(seen_at=db_now(-3600)))
        if contract:
            upgrade(settings, contract=True)
    finally:
        database.close()


def pending_contract_step(_present: set[str], *, contract: bool) -> str:
    return newest_revision() if contract else PINNED["revision"]


def test_job_of_a_newer_version_waits_for_a_newer_worker(database: Database) -> None:
    with database.transaction(write=True) as session:
        newer = add_job(session).id
        session.execute(sa.update(Job).values(spec={"from_the_future": True}))
        older = add_job(session).id
        session.execute(sa.update(SchemaState).values(generation=GENERATION + 1))
    with database.transaction(write=True) as session:
        claimed = claim_next(session, worker="old", lease_seconds=60)
        assert claimed is not None
        assert claimed.job_id == older
        assert claim_next(session, worker="old", lease_seconds=60) is None
    with database.transaction(write=False) as session:
        job = session.get_one(Job, newer)
        assert (job.status, job.token, job.attempts_spent) == (JobStatus.QUEUED, 0, 0)
