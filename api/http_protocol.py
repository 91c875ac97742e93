"""Uvicorn's HTTP protocol within limits of bytes, time and connections.

Uvicorn reads a request head of any size and for any time, parses any number of pipelined requests ahead, and waits for
ever for a body and for a client that does not read. All of that happens before the application sees a request, and so
before anybody is authenticated. What is refused here is answered with problem details, like all other errors.
"""

import asyncio
import fcntl
import itertools
import math
import random
import struct
import termios
from collections import Counter
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, ClassVar, Final

import httptools
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from api.client_shares import ClientShares, network_of, plain_address
from api.http_limits import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_PIPELINED,
    MAX_URL_BYTES,
    ConnectionLimits,
    HeadTooLarge,
    MalformedRequest,
    RequestTimeout,
    TooManyConnections,
    UriTooLong,
)
from api.problems import MEDIA_TYPE, problem_content, problem_headers
from domain.errors import ApiError
from domain.logs import LogThrottle

_SLICE_BYTES: Final = 16384
"""How much the parser is given at once: what it has not passed on is counted after each slice."""
_MIN_BODY_BYTES: Final = 1024
"""How much of a body must arrive within `ConnectionLimits.body_seconds`."""
_MAX_REFUSED: Final = 64
"""Connections beyond the limit that are told so; further ones are reset."""
_CLOCK_SECONDS: Final = 0.5
"""The interval at which waits are measured."""

_log = structlog.get_logger(__name__)


class _Phase(Enum):
    """What a connection waits for."""

    HEAD = auto()
    """The rest of a request's head."""
    BODY = auto()
    """The rest of a request's body, which the application reads."""
    DISCARD = auto()
    """The rest of a request that has been answered; it is thrown away."""
    CLOSED = auto()
    """The client's end: the server's has been closed, and what arrives is thrown away."""
    IDLE = auto()
    """Nothing, or the next request: Uvicorn closes connections that have been idle for too long."""


class ConnectionTable:
    """The open connections of one process, their shares, and the clock that ends those which make it wait too long."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.refused: set[LimitedHttpProtocol] = set()
        """The connections beyond the limit that are being told so."""
        self._shares = ClientShares(limits.max_connections, TooManyConnections)
        self._open: set[LimitedHttpProtocol] = set()
        self.refusals: Counter[str] = Counter()
        """How many connections were refused or ended, by the reason."""
        self._throttle = LogThrottle()
        self._timer: asyncio.TimerHandle | None = None
        waits = (limits.head_seconds, limits.body_seconds, limits.write_seconds, limits.discard_seconds)
        self._interval = min(_CLOCK_SECONDS, min(waits) / 4)

    @property
    def open_connections(self) -> int:
        """The connections that are open, those among them that are being refused."""
        return len(self._open)

    def add(self, connection: "LimitedHttpProtocol") -> None:
        """Count a new connection.

        Raises:
            TooManyConnections, ClientShareExceeded: it is one too many.
        """
        self._open.add(connection)
        if self._timer is None:
            self._timer = connection.loop.call_later(self._interval, self._tick, connection.loop)
        try:
            self._shares.take(connection.network)
        except ApiError:
            self.refused.add(connection)
            raise

    def remove(self, connection: "LimitedHttpProtocol") -> None:
        """Forget a connection that is lost."""
        self._open.discard(connection)
        if connection in self.refused:
            self.refused.discard(connection)
        else:
            self._shares.release(connection.network)

    def log(self, reason: str, connection: "LimitedHttpProtocol") -> None:
        """Count and log that a connection is refused or ended; of many such lines some are left out and counted."""
        self.refusals[reason] += 1
        suppressed = self._throttle.admit(reason)
        if suppressed is not None:
            _log.warning(
                "connection_refused",
                reason=reason,
                client=connection.network,
                connections=self._shares.total,
                suppressed=suppressed,
            )

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in tuple(self._open):
            connection.check(now)
        self._timer = loop.call_later(self._interval, self._tick, loop) if self._open else None


def protocol_over(table: ConnectionTable) -> type["LimitedHttpProtocol"]:
    """The protocol for a server whose connections are in `table`."""
    return type("LimitedHttpProtocol", (LimitedHttpProtocol,), {"table": table})


class _Transport(asyncio.Transport):
    """A transport that closes in two steps where the client may still be sending, and counts what it was given.

    A socket that is closed with unread bytes in it resets the connection, and the client may never see the response
    that was sent before. So only the sending end is closed at first; see RFC 9112, section 9.6.
    """

    def __init__(
        self, inner: asyncio.Transport, is_receiving: Callable[[], bool], on_close: Callable[[], None]
    ) -> None:
        super().__init__()
        self._inner = inner
        self._is_receiving = is_receiving
        self._on_close = on_close
        self._closing = False
        self.written = 0
        """Bytes that were given to the transport."""

    def write(self, data: Any) -> None:
        self.written += len(data)
        self._inner.write(data)

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        if self._inner.is_closing() or not self._is_receiving():
            self._inner.close()
            return
        self._on_close()
        self._inner.write_eof()

    def close_at_once(self) -> None:
        """Close without waiting for the client, but for the bytes that it was sent."""
        self._closing = True
        self._inner.close()

    def abort(self) -> None:
        self._closing = True
        self._inner.abort()

    def is_closing(self) -> bool:
        return self._closing or self._inner.is_closing()

    def outstanding(self) -> int:
        """Bytes that the client has not acknowledged, of those that do not fit into the buffers of the kernel and of
        those in them; 0 where all fit.
        """
        buffered = self._inner.get_write_buffer_size()
        return buffered + self._in_kernel() if buffered else 0

    def _in_kernel(self) -> int:
        socket = self._inner.get_extra_info("socket")
        try:
            return int(struct.unpack("i", fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
        except (AttributeError, OSError):
            return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        if not self._inner.is_closing():
            self._inner.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._inner.get_write_buffer_size()


class LimitedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    table: ClassVar[ConnectionTable]
    _transport: _Transport

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.network = ""
        """The network of the client, which its share of the connections is counted for."""
        self._phase = _Phase.HEAD
        self._turn = 0
        self._unparsed_bytes = 0
        self._header_bytes = self._trailers = self._hosts = 0
        self._received = 0
        self._ignores_input = False
        # What the clock saw last.
        self._seen_turn = -1
        self._seen_received = self._seen_sent = 0
        self._deadline = self._write_deadline = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # As Uvicorn declares it.
        self._transport = _Transport(
            transport,
            is_receiving=lambda: self._phase is not _Phase.IDLE,
            on_close=self._discard_until_closed,
        )
        super().connection_made(self._transport)
        if self.client:
            # A proxy that is trusted by its IPv4 address is, whichever version the socket is of.
            self.client = (plain_address(self.client[0]), self.client[1])
        self.network = network_of(self.client[0]) if self.client else ""
        try:
            self.table.add(self)
        except ApiError as error:
            self.table.log(error.code, self)
            if len(self.table.refused) > _MAX_REFUSED:
                self._ignores_input = True
                self._transport.abort()
            else:
                self._respond_and_close(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.table.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._ignores_input:
            return
        self._unset_keepalive_if_required()
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.HEAD)
        self._received += len(data)
        try:
            if len(data) <= _SLICE_BYTES:
                self._parse(data)
            else:
                view = memoryview(data)
                for start in range(0, len(data), _SLICE_BYTES):
                    self._parse(view[start : start + _SLICE_BYTES])
        except httptools.HttpParserUpgrade:
            # The request is served as it is, and the connection ends with it.
            self._ignore_input()
        except httptools.HttpParserError as error:
            # Errors that a callback raises are the context of the parser's own.
            if not self._ignores_input:
                self._refuse(error.__context__ if isinstance(error.__context__, ApiError) else MalformedRequest())

    def _parse(self, piece: bytes | memoryview) -> None:
        if self._ignores_input:
            return
        self._unparsed_bytes += len(piece)
        self.parser.feed_data(piece)
        # The parser keeps a field that has not ended, however long it grows.
        if self._unparsed_bytes > MAX_HEADER_BYTES and not self._ignores_input:
            self._refuse(HeadTooLarge())

    def on_message_begin(self) -> None:
        if self._ignores_input:
            # Stops the parser, so it is called for no request that will not be served.
            raise MalformedRequest
        super().on_message_begin()
        self._header_bytes = self._trailers = self._hosts = self._unparsed_bytes = 0
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.HEAD)

    def on_url(self, url: bytes) -> None:
        self._unparsed_bytes = 0
        if len(self.url) + len(url) > MAX_URL_BYTES:
            raise UriTooLong
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value) + 4
        if self._phase is _Phase.HEAD:
            if len(self.headers) >= MAX_HEADERS or self._header_bytes > MAX_HEADER_BYTES:
                raise HeadTooLarge
            self._check_framing(name.lower(), value)
            super().on_header(name, value)
            return
        # Trailer fields are not header fields: nothing here reads any.
        self._trailers += 1
        if self._trailers > MAX_HEADERS or self._header_bytes > MAX_HEADER_BYTES:
            raise HeadTooLarge

    def _check_framing(self, name: bytes, value: bytes) -> None:
        if name == b"host":
            self._hosts += 1
        elif name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            # The parser takes `gzip, chunked` for chunks, and the body would be read as it is not.
            raise MalformedRequest

    def on_headers_complete(self) -> None:
        if self._hosts > 1 or (self._hosts == 0 and self.parser.get_http_version() == "1.1"):
            # RFC 9112, section 3.2: what stands between may take another for whom this is for.
            raise MalformedRequest
        super().on_headers_complete()
        self._header_bytes = self._unparsed_bytes = 0
        self._enter(_Phase.BODY)
        if len(self.pipeline) >= MAX_PIPELINED:
            self.table.log("pipelined_requests", self)
            self._ignore_input()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._unparsed_bytes = 0
        self._enter(_Phase.IDLE)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._phase is _Phase.BODY and self.cycle.response_complete:
            self._enter(_Phase.DISCARD)

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            # Clients that have asked nothing, or have their response, are not waited for.
            self._transport.close_at_once()
        else:
            self.cycle.keep_alive = False

    def check(self, now: float) -> None:
        """End the connection if the client has made it wait for too long.

        Args:
            now: the time of the event loop, in seconds.
        """
        limits = self.table.limits
        if self._is_stuck(now, limits.write_seconds):
            self.table.log("write_timeout", self)
            self._transport.abort()
            return
        if self._turn != self._seen_turn:
            self._seen_turn = self._turn
            self._start_wait(now)
        elif self._phase is _Phase.BODY and self._has_progressed():
            self._start_wait(now)
        elif self._phase is not _Phase.IDLE and now >= self._deadline:
            self._time_out()

    def _start_wait(self, now: float) -> None:
        limits = self.table.limits
        seconds = {_Phase.HEAD: limits.head_seconds, _Phase.BODY: limits.body_seconds}
        self._deadline = now + seconds.get(self._phase, limits.discard_seconds)
        self._seen_received = self._received

    def _has_progressed(self) -> bool:
        # Where reading is paused, the body waits for the application.
        return self.flow.read_paused or self._received >= self._seen_received + _MIN_BODY_BYTES

    def _is_stuck(self, now: float, seconds: float) -> bool:
        """Whether bytes wait for the client, of which it has taken none for so many seconds."""
        outstanding = self._transport.outstanding()
        sent = self._transport.written - outstanding
        if not outstanding or sent != self._seen_sent:
            self._seen_sent = sent
            self._write_deadline = now + seconds
        return now >= self._write_deadline

    def _time_out(self) -> None:
        if self._phase in (_Phase.DISCARD, _Phase.CLOSED):
            self._phase = _Phase.IDLE
            self._transport.close_at_once()
            return
        # It is looked at again only if something else happens.
        self._deadline = math.inf
        self.table.log("head_timeout" if self._phase is _Phase.HEAD else "body_timeout", self)
        if self._received:
            self._refuse(RequestTimeout())
        else:
            # Nobody asked anything.
            self._ignores_input = True
            self._phase = _Phase.IDLE
            self._transport.close()

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._turn += 1

    def _ignore_input(self) -> None:
        """End the connection with the response to the newest request."""
        self._ignores_input = True
        self.cycle.keep_alive = False
        if self.cycle.response_complete:
            self._transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer what was received of a request with an error, and close."""
        if not isinstance(error, RequestTimeout):
            self.table.log(error.code, self)
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self._respond_and_close(error)
        elif self._phase is _Phase.HEAD or cycle.response_started:
            # Earlier requests are being answered.
            self._ignore_input()
        elif self.pipeline:
            # Earlier requests are being answered, and this one waits with half of its body.
            self._ignores_input = True
            self._transport.abort()
        else:
            # The application reads the body, and is told that the client is gone.
            cycle.disconnected = True
            self._respond_and_close(error)
            cycle.message_event.set()

    def _respond_and_close(self, error: ApiError) -> None:
        self._ignores_input = True
        request_id = f"{random.getrandbits(128):032x}"
        content = problem_content(error, request_id).encode()
        headers = {
            **problem_headers(error),
            "content-type": MEDIA_TYPE,
            "content-length": str(len(content)),
            "connection": "close",
            "x-request-id": request_id,
        }
        lines = [f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items()]
        default = itertools.chain.from_iterable(
            (name, b": ", value, b"\r\n") for name, value in self.server_state.default_headers
        )
        self._transport.write(b"".join([STATUS_LINE[error.status], *default, *lines, b"\r\n", content]))
        self._transport.close()

    def _discard_until_closed(self) -> None:
        self._ignores_input = True
        self._enter(_Phase.CLOSED)
        self.flow.resume_reading()
