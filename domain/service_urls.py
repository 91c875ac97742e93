"""The addresses of the database and of the broker, checked when they are read."""

from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from domain.environment import make_absolute

_DATABASE: Final = "POCL_DATABASE_URL"
_REDIS: Final = "POCL_REDIS_URL"
_DATABASE_PASSWORD: Final = "POCL_DATABASE_PASSWORD"
_REDIS_PASSWORD: Final = "POCL_REDIS_PASSWORD"
_DATABASE_FORMS: Final = f"{_DATABASE} must be a sqlite:///PATH or a postgresql://USER:PASSWORD@HOST:PORT/NAME address"
_REDIS_FORMS: Final = f"{_REDIS} must be redis://HOST:PORT/NUMBER, rediss://HOST:PORT/NUMBER or unix:///PATH"
_ENCODE: Final = "write reserved characters of user, password and path percent-encoded (@ as %40, # as %23, ? as %3F)"
_REDIS_PARAMETERS: Final = ("db", "ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")


def sqlite_url(file: Path) -> str:
    """The address of an SQLite file, whatever characters its path has."""
    return URL.create("sqlite", database=str(file)).render_as_string()


def check_database_url(address: str) -> str:
    """The address in the form that the service uses: of an SQLite file with its path absolute.

    Raises:
        ValueError: it is no address of a database that the service can use.
    """
    # The short name of the scheme, which many platforms give out.
    if address.startswith("postgres://"):
        address = address.replace("postgres://", "postgresql://", 1)
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        raise ValueError(f"{_DATABASE_FORMS}; {_ENCODE}") from None
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        return sqlite_url(_sqlite_file(url))
    if url.drivername not in ("postgresql", "postgresql+psycopg"):
        raise ValueError(f"{_DATABASE_FORMS}, without another driver")
    _check_postgresql(url)
    return address


def _sqlite_file(url: URL) -> Path:
    if url.host or url.username or url.password or url.port:
        raise ValueError(
            f"{_DATABASE} must have three slashes before the path of a SQLite file, four if it is absolute"
        )
    if url.query:
        raise ValueError(f"{_DATABASE} may have no parameters for SQLite: {_ENCODE}")
    if url.database in (None, "", ":memory:") or str(url.database).startswith("file:"):
        raise ValueError(f"{_DATABASE} must name a SQLite file: several processes share it")
    return make_absolute(str(url.database))


def _check_postgresql(url: URL) -> None:
    # Only what uses a database pays for its driver.
    from psycopg import ProgrammingError
    from psycopg.conninfo import make_conninfo

    if (url.host is not None and not url.host.isprintable()) or any(mark in (url.host or "") for mark in "@# "):
        raise ValueError(f"{_DATABASE} has no such host: {_ENCODE}")
    try:
        _, parameters = url.get_dialect()().create_connect_args(url)
        make_conninfo("", **parameters)
    except (ArgumentError, ProgrammingError, ValueError):
        raise ValueError(f"{_DATABASE} has parameters that libpq does not know; {_ENCODE}") from None


def check_redis_url(address: str) -> str:
    """The address of the broker, unchanged.

    Raises:
        ValueError: it is none.
    """
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"{_REDIS_FORMS}; {_ENCODE}") from None
    parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
    path = parts.path.removeprefix("/")
    if parts.scheme not in ("redis", "rediss", "unix") or not address.isprintable() or " " in address:
        raise ValueError(f"{_REDIS_FORMS}; {_ENCODE}")
    if not (path if parts.scheme == "unix" else host) or parts.fragment:
        raise ValueError(f"{_REDIS_FORMS}; {_ENCODE}")
    if unknown := sorted(set(parameters) - set(_REDIS_PARAMETERS)):
        raise ValueError(
            f"{_REDIS} has unknown parameters ({', '.join(unknown)}); known: {', '.join(_REDIS_PARAMETERS)}"
        )
    numbers = [parameters.get("db", "0"), *([] if parts.scheme == "unix" else [path or "0"])]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise ValueError(f"{_REDIS_FORMS}: the database's number is none")
    return address


def add_database_password(address: str, password: str | None) -> str:
    """A checked address of a database with this password in it, whatever characters it has; unchanged without one.

    Raises:
        ValueError: the address has a password already, or is none of a server.
    """
    if password is None:
        return address
    url = make_url(address)
    if url.get_backend_name() != "postgresql":
        raise ValueError(f"{_DATABASE_PASSWORD} is for a PostgreSQL server: give its address in {_DATABASE}")
    if url.password or "password" in url.query:
        raise ValueError(f"{_DATABASE} has a password, and {_DATABASE_PASSWORD} is given too: give one of them")
    if not (url.username or "user" in url.query):
        raise ValueError(f"{_DATABASE} names no user for {_DATABASE_PASSWORD}: write postgresql://USER@HOST:PORT/NAME")
    return url.set(password=password).render_as_string(hide_password=False)


def add_redis_password(address: str | None, password: str | None) -> str | None:
    """A checked address of a broker with this password in it, whatever characters it has; unchanged without one.

    Raises:
        ValueError: the address has a password already, or is none that is reached by TCP.
    """
    if password is None:
        return address
    parts = urlsplit(address or "")
    if parts.scheme not in ("redis", "rediss"):
        raise ValueError(f"{_REDIS_PASSWORD} is for a server at redis:// or rediss://: give its address in {_REDIS}")
    if parts.password:
        raise ValueError(f"{_REDIS} has a password, and {_REDIS_PASSWORD} is given too: give one of them")
    server = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:{quote(password, safe='')}@{server}"))
