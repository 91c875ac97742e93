"""The migrations make the schema that the rows are declared with."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.command import downgrade
from alembic.config import Config
from alembic.migration import MigrationContext

import migrations
from domain.db import Base, create_engine_for, upgrade
from domain.settings import Settings


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = create_engine_for(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", database_url=database_url)


def test_migrated_schema_is_the_declared_one(engine: sa.Engine, settings: Settings) -> None:
    upgrade(settings)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_a_column_that_no_migration_makes_would_be_found(engine: sa.Engine, settings: Settings) -> None:
    upgrade(settings)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE jobs DROP COLUMN percent"))
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        ((operation, _schema, table, column),) = compare_metadata(context, Base.metadata)
    assert (operation, table, column.name) == ("add_column", "jobs", "percent")


def test_checks_of_enumerations_are_migrated_as_declared(engine: sa.Engine, settings: Settings) -> None:
    # Alembic does not compare CHECK constraints.
    upgrade(settings)
    migrated = checks_of(engine)
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        Base.metadata.create_all(connection)
    assert migrated == checks_of(engine)
    assert len(migrated) == 5


def checks_of(engine: sa.Engine) -> set[tuple[str, str | None, str]]:
    inspector = sa.inspect(engine)
    return {
        (table, check["name"], check["sqltext"])
        for table in Base.metadata.tables
        for check in inspector.get_check_constraints(table)
    }


def test_upgrade_may_be_repeated_and_run_from_many_threads_at_once(engine: sa.Engine, settings: Settings) -> None:
    with ThreadPoolExecutor(4) as pool:
        for running in [pool.submit(upgrade, settings) for _ in range(8)]:
            running.result()
    assert sa.inspect(engine).has_table("jobs")


def test_processes_that_start_together_on_nothing_all_find_the_schema(tmp_path: Path) -> None:
    program = "from domain.db import upgrade; from domain.settings import Settings; upgrade(Settings())"
    # Started elsewhere: the migrations are found by their package, not by the working directory.
    environment = {**os.environ, "POCL_HOME": str(tmp_path / "fresh 100%")}
    started = [subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert (tmp_path / "fresh 100%").stat().st_mode & 0o777 == 0o700


def test_downgrade_leaves_nothing_behind(engine: sa.Engine, settings: Settings) -> None:
    upgrade(settings)
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(Path(str(migrations.__file__)).parent))
        downgrade(config, "base")
    assert sa.inspect(engine).get_table_names() == ["alembic_version"]
