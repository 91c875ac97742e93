"""Fixtures of real servers and fresh databases, for every test that asks for one.

A plugin of its own, which `tests/conftest.py` loads where the service's packages are installed: a machine with a GPU
that runs the tests marked `cuda` alone has none of them.
"""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from domain.db import Database
from domain.schema import upgrade
from domain.settings import Settings
from tests.support import s3_server as s3
from tests.support import servers, unit_run
from tests.support.databases import DATABASES
from tests.support.processes import Processes
from tests.support.s3_server import S3Server


def pytest_report_header(config: pytest.Config) -> list[str]:
    if unit_run.is_asked_for(config):
        return ["unit: no server, no process, no long run"]
    return [f"redis: {_found(servers.find_redis)}", f"postgres: {_found(servers.find_postgres)}"]


def _found(find: Callable[[], servers.Server]) -> str:
    try:
        return str(find())
    except servers.ServiceMissing as missing:
        # Said here, and raised again by the first test that needs it.
        return f"NOT FOUND. {missing}"


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


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server of this session, with an empty bucket."""
    weed = s3.find_weed()
    if weed is None:
        pytest.skip(s3.NEEDED)
    with s3.running_s3(weed, tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket_address(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty prefix in a bucket, to which the environment of this test leads."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session", params=DATABASES)
def backend(request: pytest.FixtureRequest) -> str:
    """Which database a test runs on: every test that asks for one runs on SQLite and on PostgreSQL."""
    return str(request.param)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with the newest schema and no rows: copying it is a hundred times faster than migrating."""
    directory = tmp_path_factory.mktemp("template")
    upgrade(Settings(home=directory, database_url=f"sqlite:///{directory / 'template.db'}"))
    return directory / "template.db"


@pytest.fixture(scope="session")
def postgres_template(postgres_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Name of a PostgreSQL database with the newest schema and no rows."""
    name = f"template_{uuid.uuid4().hex}"
    with servers.fresh_database(postgres_server, name) as url:
        upgrade(Settings(home=tmp_path_factory.mktemp("template"), database_url=url))
        yield name


@pytest.fixture
def empty_database_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database without a schema."""
    if backend == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    # Asked for by name, so that a run of SQLite tests alone starts no server.
    server = request.getfixturevalue("postgres_server")
    with servers.fresh_database(server, f"test_{uuid.uuid4().hex}") as url:
        yield url


@pytest.fixture
def database_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database of this test alone, with the newest schema and no rows."""
    with _copied_template(backend, request, tmp_path) as url:
        yield url


@pytest.fixture(scope="module")
def shared_database_url(
    backend: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of a database of this module's tests, which had the newest schema and no rows before the first of them."""
    with _copied_template(backend, request, tmp_path_factory.mktemp("database")) as url:
        yield url


@contextmanager
def _copied_template(backend: str, request: pytest.FixtureRequest, directory: Path) -> Iterator[str]:
    if backend == "sqlite":
        shutil.copyfile(request.getfixturevalue("sqlite_template"), directory / "test.db")
        yield f"sqlite:///{directory / 'test.db'}"
        return
    server, template = request.getfixturevalue("postgres_server"), request.getfixturevalue("postgres_template")
    with servers.fresh_database(server, f"test_{uuid.uuid4().hex}", template=template) as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database of this test alone, with the newest schema and no rows."""
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path / "processes")
    yield made
    made.kill_all()
