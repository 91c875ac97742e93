"""A stand-in for a pooler in transaction mode, such as PgBouncer: each transaction of a client runs in another session.

It speaks just enough of PostgreSQL's protocol: it passes the bytes on, and looks at the messages of the server for the
end of a transaction. While `thawed` is cleared it stands still as a stopped server does, with its connections open.
"""

import itertools
import selectors
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

_SESSIONS = 3
_READY, _IDLE = b"Z", b"I"


class TransactionPooler:
    """Listens at a port of loopback, and shares sessions of the server at `server_socket` between its clients."""

    def __init__(self, server_socket: Path) -> None:
        self._server_socket = server_socket
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.thawed = threading.Event()
        self.thawed.set()
        """Cleared: nothing is passed on, and nobody is told."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.thawed.set()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with closing(client), suppress(OSError, EOFError):
            self.thawed.wait()
            startup = _read_startup(client)
            sessions = [self._open_session(startup) for _ in range(_SESSIONS)]
            # The client sees the greeting of one of them.
            client.sendall(sessions[0][1])
            try:
                self._pass_on(client, [session for session, _ in sessions])
            finally:
                for session, _ in sessions:
                    session.close()

    def _open_session(self, startup: bytes) -> tuple[socket.socket, bytes]:
        """A session of the server, and all that the server said until it was ready."""
        session = socket.socket(socket.AF_UNIX)
        session.connect(str(self._server_socket))
        session.sendall(startup)
        said = b""
        while True:
            kind, message = _read_message(session)
            said += message
            if kind in (_READY, b"E"):
                return session, said

    def _pass_on(self, client: socket.socket, sessions: list[socket.socket]) -> None:
        for session in itertools.cycle(sessions):
            with selectors.DefaultSelector() as selector:
                selector.register(client, selectors.EVENT_READ)
                selector.register(session, selectors.EVENT_READ)
                ended = False
                while not ended:
                    ready = {key.fileobj for key, _ in selector.select()}
                    self.thawed.wait()
                    if session in ready:
                        kind, message = _read_message(session)
                        client.sendall(message)
                        # The transaction has ended: the next one runs in another session.
                        ended = kind == _READY and message[-1:] == _IDLE
                    elif client in ready:
                        session.sendall(_read_some(client))


def _read_some(source: socket.socket) -> bytes:
    data = source.recv(65536)
    if not data:
        raise EOFError
    return data


def _read_exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = source.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _read_startup(client: socket.socket) -> bytes:
    while True:
        length = _read_exactly(client, 4)
        body = _read_exactly(client, struct.unpack("!I", length)[0] - 4)
        if struct.unpack("!I", body[:4])[0] not in (80877103, 80877104):
            return length + body
        # No encryption here: the client asks once, and goes on without.
        client.sendall(b"N")


def _read_message(session: socket.socket) -> tuple[bytes, bytes]:
    kind, length = _read_exactly(session, 1), _read_exactly(session, 4)
    return kind, kind + length + _read_exactly(session, struct.unpack("!I", length)[0] - 4)


@contextmanager
def transaction_pooler(server_socket: Path) -> Iterator[TransactionPooler]:
    """A pooler that runs."""
    pooler = TransactionPooler(server_socket)
    try:
        yield pooler
    finally:
        pooler.close()
