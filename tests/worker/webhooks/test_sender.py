"""One attempt: signed, bounded in time and bytes, and only to an address that was checked."""

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from domain.webhooks.deliveries import AttemptResult, DueMessage
from domain.webhooks.signing import new_secret
from tests.support.webhook_receiver import Answer, Receiver
from worker.webhooks.sender import WebhookSender

SECRET = new_secret()
MESSAGE = DueMessage("msg_1", "webhook.test", '{"type":"webhook.test","data":{"text":"\u00fc"}}', "", (SECRET,))


def sender(**options: Any) -> WebhookSender:
    made = WebhookSender(frozenset({"127.0.0.1", "hooks.internal"}), "test", proxy_of=lambda _: None)
    return replace(made, **options)


def send(url: str, **options: Any) -> AttemptResult:
    return sender(**options).send(replace(MESSAGE, url=url))


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server on a free port that does whatever `answer` does with its first connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]


def read_request(connection: socket.socket) -> bytes:
    """The whole request: a server that closes before it has read all resets the connection, and its answer is lost."""
    read = b""
    while not read.endswith(MESSAGE.body.encode()):
        piece = connection.recv(65536)
        if not piece:
            break
        read += piece
    return read


def test_message_is_verified_by_the_library_of_the_specification(receiver: Receiver) -> None:
    result = send(f"{receiver.url}?a=b%20c")
    assert (result.error, result.status_code) == (None, 204)
    (request,) = receiver.requests
    assert request.verify(SECRET)["data"]["text"] == "\u00fc"
    assert request.path == "/hook?a=b%20c"
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert request.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(200, body=b"x" * 100_000), None),
        (Answer(301, {"location": "http://127.0.0.1/"}), "redirected"),
        (Answer(307, {"location": "http://169.254.169.254/"}), "redirected"),
        (Answer(410), "gone"),
        (Answer(404), "status_not_2xx"),
        (Answer(500), "status_not_2xx"),
    ],
    ids=["2xx", "301", "307", "410", "404", "500"],
)
def test_status_decides_and_no_redirect_is_followed(receiver: Receiver, answer: Answer, error: str | None) -> None:
    receiver.answers = [answer]
    result = send(receiver.url)
    assert (result.error, result.status_code) == (error, answer.status)
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("120", 120), ("999999999999", 86400), ("-5", None), ("soon", None), ("", None), ("\u0664", None)],
    ids=["number", "long", "negative", "words", "empty", "foreign"],
)
def test_retry_after_is_read_and_bounded(receiver: Receiver, value: str, seconds: float | None) -> None:
    receiver.answers = [Answer(503, {"retry-after": value.encode().decode("latin-1")})]
    assert send(receiver.url).retry_after == seconds


def test_retry_after_may_be_a_date(receiver: Receiver) -> None:
    now = datetime(2026, 11, 27, 12, tzinfo=UTC)
    receiver.answers = [Answer(429, {"retry-after": format_datetime(now + timedelta(minutes=5), usegmt=True)})]
    assert send(receiver.url, now=lambda: now).retry_after == 300


@pytest.mark.parametrize(
    "addresses",
    [
        ["10.0.0.1"],
        ["127.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:10.0.0.1"],
        ["fe80::1%eth0"],
        ["fd00:ec2::254"],
        ["64:ff9b::a00:1"],
        ["93.184.216.34", "10.0.0.1"],
    ],
    ids=lambda addresses: addresses[-1],
)
def test_name_that_leads_to_a_private_address_is_not_connected_to(addresses: Sequence[str]) -> None:
    result = send("https://hooks.example/", resolver=lambda _host, _port: addresses)
    assert (result.error, result.status_code) == ("address_not_allowed", None)
    assert addresses[-1] not in result.detail


def test_internal_name_never_leads_to_a_link_local_address() -> None:
    result = send("http://hooks.internal/", resolver=lambda _host, _port: ["169.254.169.254"])
    assert result.error == "address_not_allowed"


def test_name_is_resolved_once_and_its_checked_address_is_connected_to(receiver: Receiver) -> None:
    asked: list[tuple[str, int]] = []

    def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append((host, port))
        # A second answer would be another address.
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    result = send(f"http://hooks.internal:{receiver.port}/hook", resolver=rebinding)
    assert result.error is None
    assert asked == [("hooks.internal", receiver.port)]
    assert receiver.requests[0].headers["host"] == f"hooks.internal:{receiver.port}"


def test_next_address_is_tried_where_nobody_listens_at_the_first(receiver: Receiver) -> None:
    addresses = ["127.0.0.99", "127.0.0.1"]
    assert send(f"http://hooks.internal:{receiver.port}/", resolver=lambda _h, _p: addresses).error is None


def test_name_without_an_address_is_an_error_of_its_own() -> None:
    def unknown(_host: str, _port: int) -> Sequence[str]:
        raise socket.gaierror("no such name")

    assert send("https://hooks.example/", resolver=unknown).error == "name_not_resolved"
    assert send("https://hooks.example/", resolver=lambda _h, _p: []).error == "name_not_resolved"


def test_resolver_that_hangs_is_waited_for_no_longer_than_the_attempt_may_take() -> None:
    released = threading.Event()

    def hanging(_host: str, _port: int) -> Sequence[str]:
        released.wait()
        return []

    try:
        assert send("https://hooks.example/", resolver=hanging, seconds=0.05).error == "timed_out"
    finally:
        released.set()


def test_url_that_is_no_longer_allowed_is_not_sent_to(receiver: Receiver) -> None:
    assert send(receiver.url, internal_hosts=frozenset()).error == "url_not_allowed"
    assert receiver.requests == []


def test_receiver_that_answers_byte_by_byte_is_given_up_in_time() -> None:
    ended = threading.Event()

    def drip(connection: socket.socket) -> None:
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
            while not ended.wait(0.01):
                connection.sendall(b"a")
        except OSError:
            return

    with raw_server(drip) as port:
        result = send(f"http://127.0.0.1:{port}/", seconds=0.2)
        ended.set()
    assert (result.error, result.status_code) == ("timed_out", None)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "response_invalid"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 50_000 + b"\r\n", "response_invalid"),
        (b"", "response_invalid"),
    ],
    ids=["other protocol", "endless head", "nothing"],
)
def test_answer_that_is_no_http_is_an_error(answer: bytes, error: str) -> None:
    def reply(connection: socket.socket) -> None:
        read_request(connection)
        try:
            connection.sendall(answer)
        except OSError:
            return

    with raw_server(reply) as port:
        assert send(f"http://127.0.0.1:{port}/").error == error


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert send(f"http://127.0.0.1:{port}/").error == "connection_failed"


def test_proxy_gets_the_checked_address_and_never_the_name() -> None:
    asked: list[bytes] = []

    def refuse(connection: socket.socket) -> None:
        asked.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")

    with raw_server(refuse) as port:
        proxy = f"http://user:p%40ss@127.0.0.1:{port}"
        result = send("https://hooks.example/", resolver=lambda _h, _p: ["93.184.216.34"], proxy_of=lambda _: proxy)
    assert result.error == "proxy_failed"
    assert asked[0].startswith(b"CONNECT 93.184.216.34:443 HTTP/1.1\r\n")
    assert b"hooks.example" not in asked[0]
    assert b"Basic dXNlcjpwQHNz" in asked[0]


def test_proxy_is_not_asked_for_a_private_address() -> None:
    result = send(
        "https://hooks.example/", resolver=lambda _h, _p: ["10.0.0.1"], proxy_of=lambda _: "http://127.0.0.1:1"
    )
    assert result.error == "address_not_allowed"
    other = send("https://hooks.example/", resolver=lambda _h, _p: ["1.1.1.1"], proxy_of=lambda _: "socks5://x:1")
    assert other.error == "proxy_failed"


@pytest.mark.system
def test_certificate_is_checked_against_the_name_and_not_the_address(tmp_path: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=hooks.internal", "-addext", "subjectAltName=DNS:hooks.internal"]
    command += ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "certificate.pem")]
    subprocess.run(command, check=True, capture_output=True)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    trusting = ssl.create_default_context(cafile=tmp_path / "certificate.pem")

    def reply(connection: socket.socket) -> None:
        try:
            with serving.wrap_socket(connection, server_side=True) as encrypted:
                read_request(encrypted)
                encrypted.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
        except OSError:
            return

    def attempt(name: str, context: ssl.SSLContext) -> str | None:
        with raw_server(reply) as port:
            made = sender(resolver=lambda _h, _p: ["127.0.0.1"], internal_hosts=frozenset({name}))
            made.__dict__["ssl_context"] = context
            return made.send(replace(MESSAGE, url=f"https://{name}:{port}/")).error

    assert attempt("hooks.internal", trusting) is None
    assert attempt("other.internal", trusting) == "tls_failed"
    assert attempt("hooks.internal", ssl.create_default_context()) == "tls_failed"


def test_neither_url_nor_secret_nor_body_is_logged(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"), capture_logs() as lines:
        caplog.clear()
        send(f"{receiver.url}?token=of-the-receiver")
        send("https://hooks.example/?token=of-the-receiver", resolver=lambda _h, _p: ["10.0.0.1"])
    text = f"{lines}{caplog.text}"
    assert SECRET not in text
    assert "of-the-receiver" not in text
