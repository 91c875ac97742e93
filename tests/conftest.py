"""Real servers and fresh databases for every test that asks for one."""

import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

import domain.checkpoints.models
import domain.datasets.models
import domain.idempotency.models
import domain.jobs.models
import domain.workers.models  # noqa: F401 - the five fill the metadata
from domain.db import Base, Database
from tests.support import servers
from tests.support.processes import Processes

DATABASES = ("sqlite", "postgres")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """URL of a real Valkey or Redis of this session."""
    with servers.running_redis(servers.find_redis()) as url:
        yield url


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """URL of an empty Valkey or Redis, as redis-py spells it."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a real PostgreSQL of this session, on which databases may be created."""
    with servers.running_postgres(servers.find_postgres()) as url:
        yield url


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty database: every test that asks for one runs on SQLite and on PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.db'}"
        return
    # Asked for by name, so that a run of SQLite tests alone starts no server.
    server = request.getfixturevalue("postgres_server")
    with servers.fresh_database(server, f"test_{uuid.uuid4().hex}") as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An empty database with all tables; the test of the migrations shows that these are theirs."""
    database = Database(database_url)
    with database.engine.begin() as connection:
        Base.metadata.create_all(connection)
    yield database
    database.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path / "processes")
    yield made
    made.kill_all()


def pytest_report_header() -> list[str]:
    return [f"redis: {_found(servers.find_redis)}", f"postgres: {_found(servers.find_postgres)}"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Someone who names one variant of a test wants that one alone.
    if not any("[" in argument for argument in config.args):
        refuse_half_covered(items)


def refuse_half_covered(items: list[pytest.Item]) -> None:
    """Fail the run where a database test was collected for some of the databases only."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        if isinstance(item, pytest.Function) and "database_url" in item.fixturenames:
            backend = item.callspec.params.get("database_url", "none") if hasattr(item, "callspec") else "none"
            seen[item.nodeid.partition("[")[0]][str(backend)] += 1
    for test, counted in seen.items():
        if set(counted) != set(DATABASES) or len(set(counted.values())) != 1:
            raise pytest.UsageError(f"{test} must run on {' and '.join(DATABASES)}; collected {dict(counted)}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = terminalreporter.stats.get("passed", [])
    counts = {name: sum(name in _parameters(report.nodeid) for report in passed) for name in DATABASES}
    if any(counts.values()):
        terminalreporter.write_line("databases: " + ", ".join(f"{n} passed on {name}" for name, n in counts.items()))


def _parameters(nodeid: str) -> list[str]:
    return nodeid.partition("[")[2].rstrip("]").split("-")


def _found(find: Callable[[], servers.Server]) -> str:
    try:
        return str(find())
    except servers.ServiceMissing as missing:
        # Said here, and raised again by the first test that needs it.
        return f"NOT FOUND. {missing}"
