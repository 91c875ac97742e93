"""What a client may do to the HTTP server before anybody knows who it is, on real sockets."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from pydantic import SecretStr

from api.app import create_app
from api.http_limits import MAX_HEADERS, MAX_PIPELINED, ConnectionLimits
from domain.schema import upgrade
from domain.settings import Settings
from tests.support.api_process import ServiceProcess, serving
from tests.support.http_server import HttpServer, http_server, read_to_end, request
from tests.support.process_memory import MEBIBYTE, peak_bytes
from tests.support.waiting import eventually

KEY = "a-key-of-sixteen-characters"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}
PATIENT = ConnectionLimits(max_connections=64)
HASTY = ConnectionLimits(
    max_connections=64, head_seconds=0.2, body_seconds=0.2, idle_seconds=1, write_seconds=0.2, discard_seconds=0.2
)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A service with a key."""
    settings = Settings(home=tmp_path_factory.mktemp("home"), api_key=SecretStr(KEY))
    # An upload asks for the quota of its project before its body is read.
    upgrade(settings)
    return create_app(settings)


@pytest.fixture(scope="module")
def server(app: Any) -> Iterator[HttpServer]:
    """The service, which waits for as long as no test does."""
    with http_server(app, PATIENT) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(app: Any) -> Iterator[HttpServer]:
    """The service, which waits for fifths of seconds."""
    with http_server(app, HASTY) as running:
        yield running


def problem_of(response: bytes, status: int) -> str:
    """The code of the last problem in what came back on a connection."""
    assert b"HTTP/1.1 %d " % status in response, response[:200]
    head, _, body = response[response.rindex(b"HTTP/1.1 %d " % status) :].partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    problem = json.loads(body)
    assert f"x-request-id: {problem['request_id']}".encode() in head
    return str(problem["code"])


def fields(count: int) -> bytes:
    return b"".join(b"x%d: 1\r\n" % n for n in range(count))


def test_header_fields_beyond_the_limit_are_refused(server: HttpServer) -> None:
    head = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
    assert server.exchange(head, fields(MAX_HEADERS - 2), b"\r\n").startswith(b"HTTP/1.1 200")
    assert problem_of(server.exchange(head, fields(MAX_HEADERS - 1), b"\r\n"), 431) == "head_too_large"


@pytest.mark.parametrize("start", [b"", b"x: ", b"x"], ids=["name", "value", "no name at all"])
def test_header_field_without_an_end_is_refused(server: HttpServer, start: bytes) -> None:
    head = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    assert problem_of(server.exchange(head, start, b"a" * 200_000), 431) == "head_too_large"


def test_header_fields_of_many_bytes_are_refused(server: HttpServer) -> None:
    head = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
    assert server.exchange(head, b"x: %b\r\n\r\n" % (b"a" * 60_000)).startswith(b"HTTP/1.1 200")
    assert problem_of(server.exchange(head, b"x: %b\r\n" % (b"a" * 20_000) * 4, b"\r\n"), 431) == "head_too_large"


def test_request_line_without_an_end_is_refused(server: HttpServer) -> None:
    assert problem_of(server.exchange(b"GET /", b"a" * 200_000), 414) == "uri_too_long"


def test_line_feeds_before_a_request_are_bounded(server: HttpServer) -> None:
    assert problem_of(server.exchange(b"\r\n" * 100_000), 431) == "head_too_large"


def test_malformed_request_is_answered_with_problem_details(server: HttpServer) -> None:
    assert problem_of(server.exchange(b"SSH-2.0-OpenSSH\r\n\r\n"), 400) == "malformed_request"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"GET /healthz HTTP/1.1\r\n\r\n", id="no host"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nhost: a\r\nHost: a\r\n\r\n", id="two hosts"),
        pytest.param(b"GET /healthz HTTP/1.0\r\nhost: a\r\nhost: b\r\n\r\n", id="two hosts in HTTP/1.0"),
        pytest.param(request("POST", "/v1/jobs", {"transfer-encoding": "gzip, chunked"}), id="coded chunks"),
        pytest.param(request("POST", "/v1/jobs", {"transfer-encoding": "identity"}), id="no chunks"),
        pytest.param(
            request("POST", "/v1/jobs", {"transfer-encoding": "chunked", "content-length": "2"}), id="two lengths"
        ),
    ],
)
def test_head_that_two_could_read_differently_is_refused(server: HttpServer, head: bytes) -> None:
    assert problem_of(server.exchange(head, b"2\r\n{}\r\n0\r\n\r\n"), 400) == "malformed_request"


def test_http_1_0_needs_no_host(server: HttpServer) -> None:
    assert server.exchange(b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("trailers", [fields(MAX_HEADERS + 1), b"x: " + b"a" * 100_000], ids=["many", "long"])
def test_trailer_fields_are_bounded(server: HttpServer, trailers: bytes) -> None:
    head = request("POST", "/v1/datasets", {**AUTHORIZED, "transfer-encoding": "chunked"})
    # The route answers with 415 as soon as it sees the head, or the protocol with 431.
    answer = server.exchange(head, b"1\r\na\r\n0\r\n", trailers)
    assert answer.startswith((b"HTTP/1.1 415", b"HTTP/1.1 431"))


def test_trailer_fields_are_no_header_fields() -> None:
    seen: list[list[tuple[bytes, bytes]]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        while (await receive()).get("more_body"):
            pass
        seen.append(list(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b""})

    with http_server(app, PATIENT) as server:
        head = request("POST", "/", {"transfer-encoding": "chunked"})
        server.exchange(head, b"1\r\na\r\n0\r\nauthorization: Bearer x\r\n\r\n")
    assert seen == [[(b"host", b"127.0.0.1"), (b"transfer-encoding", b"chunked")]]


def test_requests_are_parsed_ahead_within_bounds() -> None:
    started: list[str] = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        started.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    with http_server(app, PATIENT) as server:
        answer = server.exchange(request("GET", "/a") * 5000)
    # All that was taken is answered, and then the connection ends: a client sends the others again.
    assert answer.count(b"HTTP/1.1 200") == len(started) <= MAX_PIPELINED + 2
    assert answer.endswith(b"connection: close\r\n\r\n")


def test_connection_that_asks_nothing_is_closed(hasty: HttpServer) -> None:
    assert hasty.exchange() == b""


def test_head_that_does_not_arrive_is_answered_and_closed(hasty: HttpServer) -> None:
    assert problem_of(hasty.exchange(b"GET /healthz HTTP/1.1\r\nhost: "), 408) == "request_timeout"


def test_head_that_arrives_byte_by_byte_is_cut_off(hasty: HttpServer) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nx: ")
        connection.settimeout(0.02)
        answer = b""
        while not answer:
            connection.sendall(b"a")
            try:
                answer = connection.recv(65536)
            except TimeoutError:
                continue
        assert problem_of(answer, 408) == "request_timeout"


def test_second_head_on_a_connection_has_as_little_time(hasty: HttpServer) -> None:
    answer = hasty.exchange(request("GET", "/healthz"), b"GET /healthz HTTP/1.1\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert problem_of(answer, 408) == "request_timeout"


def test_body_that_does_not_arrive_is_answered_and_closed(hasty: HttpServer) -> None:
    head = request("POST", "/v1/jobs", {**AUTHORIZED, "content-type": "application/json", "content-length": "99"})
    assert problem_of(hasty.exchange(head, b"{"), 408) == "request_timeout"


def test_idle_connection_is_closed(hasty: HttpServer) -> None:
    assert hasty.exchange(request("GET", "/healthz")).count(b"HTTP/1.1") == 1


def test_client_that_does_not_read_is_dropped() -> None:
    dropped = Event()
    servers: list[HttpServer] = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not dropped.is_set():
            await send({"type": "http.response.body", "body": bytes(MEBIBYTE), "more_body": True})
            # Uvicorn tells of a lost connection here, and nowhere else.
            if servers[0].table.open_connections == 0:
                dropped.set()

    with http_server(app, HASTY) as server, server.connect() as connection:
        servers.append(server)
        connection.sendall(request("GET", "/"))
        eventually(dropped.is_set, what="the connection is dropped")


def test_key_is_asked_for_before_a_body_is(server: HttpServer) -> None:
    for path, media_type in (("/v1/datasets", "application/jsonl"), ("/v1/jobs", "application/json")):
        head = {"content-type": media_type, "content-length": "99", "expect": "100-continue"}
        answer = server.exchange(request("POST", path, head))
        assert answer.count(b"HTTP/1.1") == 1
        assert problem_of(answer, 401) == "unauthenticated"
        with server.connect() as connection:
            connection.sendall(request("POST", path, {**head, **AUTHORIZED}))
            assert connection.recv(65536).startswith(b"HTTP/1.1 100")


def test_client_that_sends_on_gets_the_refusal(server: HttpServer) -> None:
    head = request("POST", "/v1/datasets", {"content-type": "application/jsonl", "content-length": str(8 * MEBIBYTE)})
    assert problem_of(server.exchange(head, bytes(8 * MEBIBYTE)), 401) == "unauthenticated"


def test_one_client_leaves_connections_for_others(app: Any) -> None:
    """Each client may have as many connections as are free, until none is."""

    def is_served(connection: socket.socket) -> bool:
        connection.sendall(request("GET", "/healthz"))
        return connection.recv(65536).startswith(b"HTTP/1.1 200")

    with http_server(app, PATIENT) as server, ExitStack() as held:
        for client, share in enumerate((32, 16, 8, 4, 2, 1, 1), start=1):
            for _ in range(share):
                assert is_served(held.enter_context(server.connect(f"127.0.0.{client}")))
            with server.connect(f"127.0.0.{client}") as connection:
                code = problem_of(read_to_end(connection), 503 if client == 7 else 429)
            assert code == ("too_many_connections" if client == 7 else "client_share_exceeded")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_clients_by_ipv4_of_a_socket_of_both_versions_are_told_apart() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        await receive()
        seen.append(scope["client"][0])
        await send({"type": "http.response.start", "status": 204, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b""})

    with (
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listening,
        http_server(app, PATIENT, listening) as server,
    ):
        for client in ("127.0.0.1", "127.0.0.2"):
            with server.connect(client) as connection:
                connection.sendall(request("GET", "/"))
                assert read_to_end(connection).startswith(b"HTTP/1.1 204")
    assert seen == ["127.0.0.1", "127.0.0.2"]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """The service as a process, whose memory can be measured."""
    place = tmp_path_factory.mktemp("process")
    (place / "home").mkdir(mode=0o700)
    with serving(place / "home", place / "log", api_key=KEY) as process:
        yield process


def test_strangers_take_no_memory(process: ServiceProcess) -> None:
    host, port = process.address.removeprefix("http://").split(":")
    before = peak_bytes(process.process.pid)
    # The server may stop reading.
    with socket.create_connection((host, int(port))) as connection, suppress(OSError):
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * (50 * MEBIBYTE // 6))
    half = request("POST", "/v1/jobs", {"content-type": "application/json", "content-length": "1000000"})
    with ExitStack() as held:
        for _ in range(200):
            connection = held.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(half + bytes(500_000))
    for start in (b"GET /" + b"a" * 65_000, request("GET", "/v1/jobs") * 4000):
        with ExitStack() as held:
            for _ in range(100):
                connection = held.enter_context(socket.create_connection((host, int(port))))
                connection.sendall(start)
    assert peak_bytes(process.process.pid) - before < 48 * MEBIBYTE


# Lowers its own limits, and serves as `python -m api serve` does.
WITH_FEW_DESCRIPTORS = (
    "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 700)); sys.argv = ['api', 'serve'];"
    " runpy.run_module('api', run_name='__main__', alter_sys=True)"
)


def test_limit_on_open_files_is_raised_and_shuts_nobody_out(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    log = tmp_path / "log"
    with serving(tmp_path / "home", log, program=("-c", WITH_FEW_DESCRIPTORS)) as process, ExitStack() as held:
        port = int(process.address.rpartition(":")[2])
        for _ in range(500):
            held.enter_context(socket.create_connection(("127.0.0.1", port)))
        with socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0)) as probe:
            probe.sendall(request("GET", "/healthz"))
            assert probe.recv(65536).startswith(b"HTTP/1.1 200")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (raised,) = (line for line in lines if line["event"] == "open_files_raised")
    assert (raised["before"], raised["now"]) == (300, 700)
    lowered = {line["setting"]: line["now"] for line in lines if line["event"] == "limit_lowered"}
    assert lowered == {"POCL_MAX_CONNECTIONS": 188, "POCL_MAX_FOLLOWERS": 125}
    assert [line["mode_before"] for line in lines if line["event"] == "home_closed_to_others"] == ["755"]
    assert any(line.get("reason") == "client_share_exceeded" for line in lines)


def test_refusals_are_logged_and_bounded(process: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> None:
    del process  # It has refused what the test before sent.
    log = next(tmp_path_factory.getbasetemp().glob("process*/log"))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    refused = [line for line in lines if line["event"] == "authentication_refused"]
    assert 1 <= len(refused) <= 10
    assert {line["reason"] for line in refused} == {"no_credentials"}
    assert any(line["event"] == "connection_refused" and line["reason"] == "head_too_large" for line in lines)
    assert KEY not in log.read_text()
