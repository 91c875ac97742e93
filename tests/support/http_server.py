"""An application on a real socket, in a thread of this process, with the limits of a test."""

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from api.http_limits import ConnectionLimits
from api.http_protocol import ConnectionTable, protocol_over
from tests.support.api_process import free_port
from tests.support.waiting import eventually

# A test that waits longer than this for a byte or for the end of a connection has failed.
PATIENCE_SECONDS = 20


@dataclass(frozen=True)
class HttpServer:
    """A running server."""

    port: int
    table: ConnectionTable

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        """A connection from an address of loopback."""
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_SECONDS, source_address=(source, 0))

    def exchange(self, *pieces: bytes) -> bytes:
        """Send the pieces on a connection of its own; what comes back until the server closes."""
        with self.connect() as connection:
            for piece in pieces:
                connection.sendall(piece)
            return read_to_end(connection)


@contextmanager
def http_server(app: Any, limits: ConnectionLimits, listening: socket.socket | None = None) -> Iterator[HttpServer]:
    """Serve an ASGI application for as long as the block lasts, on a socket of its own unless one is given."""
    table = ConnectionTable(limits)
    port = free_port() if listening is None else listening.getsockname()[1]
    config = uvicorn.Config(
        app,
        port=port,
        http=protocol_over(table),
        ws="none",
        access_log=False,
        log_config=None,
        timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=[None if listening is None else [listening]])
    thread.start()
    try:
        eventually(lambda: server.started, what="the server listens")
        yield HttpServer(port, table)
    finally:
        server.should_exit = True
        thread.join()


def read_to_end(connection: socket.socket) -> bytes:
    """What the server sends until it closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def request(method: str, path: str, headers: Mapping[str, str] | None = None) -> bytes:
    """The head of a request."""
    fields = {"host": "127.0.0.1", **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode()
