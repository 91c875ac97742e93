"""A receiver of webhooks: an HTTP server in a thread of this process."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook


@dataclass(frozen=True)
class Answer:
    """What the receiver answers."""

    status: int = 204
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    after: threading.Event | None = None
    """Answer once this is set."""


@dataclass(frozen=True)
class Received:
    """A request that arrived."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    def verify(self, secret: str) -> dict[str, Any]:
        """The message, whose signature by the secret is verified as receivers do."""
        message: dict[str, Any] = Webhook(secret).verify(self.body, dict(self.headers))
        return message


class Receiver:
    """Requests that arrived, and how they are answered."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self.answers: list[Answer] = []
        """The answers to the next requests; 204 to all further ones."""
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    @property
    def ids(self) -> list[str]:
        return [request.headers["webhook-id"] for request in self.requests]

    @property
    def types(self) -> list[str]:
        """The types of the messages in the order in which they arrived."""
        return [request.body.decode().split('"')[3] for request in self.requests]

    def take(self, request: Received) -> Answer:
        self.requests.append(request)
        return self.answers.pop(0) if self.answers else Answer()


@contextmanager
def running_receiver() -> Iterator[Receiver]:
    """A receiver on a free port of loopback for as long as the block lasts."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = receiver.take(Received(self.path, headers, body))
            if answer.after is not None:
                answer.after.wait()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_: object) -> None:
            """A test prints nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign] # A client that hung up is no news.
    receiver.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
