"""The servers that the other tests stand on are real, fresh for every test, and never skipped."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from domain.db import Database
from domain.generations import GENERATION
from tests.conftest import slowest_first
from tests.support import servers, unit_run
from tests.support.databases import DATABASES, refuse_half_covered, selects_variants
from tests.support.rows import dump_tables
from tests.support.waiting import eventually

_NOTHING = {"PATH": "/nonexistent"}


def test_a_database_is_empty_and_speaks_its_own_dialect(empty_database_url: str, backend: str) -> None:
    engine = sa.create_engine(empty_database_url)
    with engine.begin() as connection:
        assert sa.inspect(connection).get_table_names() == []
        connection.execute(sa.text("CREATE TABLE left_behind (id INTEGER)"))
        version = "version()" if engine.dialect.name == "postgresql" else "sqlite_version()"
        assert connection.execute(sa.text(f"SELECT {version}")).scalar_one()
    engine.dispose()
    assert engine.dialect.name.startswith(backend)


def test_a_database_has_the_newest_schema_and_the_first_project_alone(database: Database) -> None:
    rows = dump_tables(database)
    assert {"jobs", "datasets", "checkpoints"} <= rows.keys()
    ((project, *_),) = rows.pop("projects")
    assert project == "default"
    ((_, generation),) = rows.pop("schema_state")
    assert generation == GENERATION
    assert not any(rows.values())


@pytest.mark.parametrize("turn", [1, 2])
def test_redis_is_empty_at_the_start_of_each_test(redis_url: str, turn: int) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("turn", turn)
        assert client.info("server")["redis_version"]


def test_a_server_named_by_the_environment_is_used_as_it_is() -> None:
    named = {"TEST_REDIS_URL": "redis://elsewhere", "TEST_DATABASE_URL": "postgresql://elsewhere"}
    assert servers.find_redis(named).url == "redis://elsewhere"
    assert servers.find_postgres(named).url == "postgresql://elsewhere"


def test_a_missing_server_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # The wheels are installed here, so their absence has to be arranged.
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    with pytest.raises(servers.ServiceMissing, match="Install"):
        servers.find_redis(_NOTHING)
    with pytest.raises(servers.ServiceMissing, match="TEST_DATABASE_URL"):
        servers.find_postgres(_NOTHING)


@pytest.mark.system
def test_a_database_test_collected_for_one_database_only_fails_the_run(request: pytest.FixtureRequest) -> None:
    items = [item for item in request.session.items if "backend" in getattr(item, "fixturenames", ())]
    refuse_half_covered(items)
    for left_out in DATABASES:
        rest = [item for item in items if f"[{left_out}" not in item.nodeid]
        if rest:
            with pytest.raises(pytest.UsageError, match="must run on"):
                refuse_half_covered(rest)


@pytest.mark.parametrize(
    ("arguments", "last_failed", "expected"),
    [
        (["tests"], False, False),
        (["tests/test_services.py::test_redis_is_empty_at_the_start_of_each_test"], False, False),
        (["tests/test_services.py::test_a_database_has_the_newest_schema_and_no_rows[sqlite]"], False, True),
        (["tests"], True, True),
    ],
)
def test_a_run_of_single_variants_is_allowed(arguments: list[str], last_failed: bool, expected: bool) -> None:
    assert selects_variants(arguments, last_failed=last_failed) is expected


@pytest.mark.system
@pytest.mark.parametrize("server", ["redis", "postgres"], ids=["valkey", "postgresql"])
def test_servers_die_with_a_test_run_that_is_killed(server: str) -> None:
    script = (
        "import signal; from tests.support import servers\n"
        f"with servers.running_{server}(servers.find_{server}()) as url:\n"
        "    print(url, flush=True); signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        url = run.stdout.readline().strip()
        answers = servers.redis_answers if server == "redis" else servers.postgres_answers
        assert answers(url)
        os.kill(run.pid, 9)
        eventually(lambda: not answers(url), what="the server is gone")


@pytest.mark.system
def test_no_process_starts_while_a_unit_test_runs() -> None:
    with unit_run.starting_no_process(), pytest.raises(RuntimeError, match="Mark it `system`"):
        subprocess.run(["true"], check=True)
    subprocess.run(["true"], check=True)


@pytest.mark.parametrize(("slow", "others", "workers"), [(5, 20, 3), (2, 9, 1), (4, 3, 2), (0, 5, 3), (3, 0, 2)])
def test_every_process_begins_with_its_share_of_the_slow_tests(slow: int, others: int, workers: int) -> None:
    items = [FakeItem(index, is_slow=index >= others) for index in range(others + slow)]
    ordered: list[Any] = list(items)
    slowest_first(ordered, workers=workers)
    assert sorted(item.index for item in ordered) == list(range(len(items)))
    assert [item.index for item in ordered if not item.is_slow] == list(range(others))
    if slow and others >= slow:
        part = len(ordered) // workers
        assert all(ordered[part * worker].is_slow for worker in range(min(workers, slow)))


@dataclass
class FakeItem:
    """What is looked at of a test."""

    index: int
    is_slow: bool

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return pytest.mark.slow.mark if self.is_slow and name == "slow" else None
