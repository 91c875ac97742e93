"""What one client may ask of the HTTP server: bytes of a request's head, time, connections; and the refusals.

`api.http_protocol` holds requests to these limits before the application sees them.
"""

from dataclasses import dataclass
from typing import Final

from domain.errors import ApiError, Unavailable

MAX_URL_BYTES: Final = 65535
"""The longest URL, percent-encoded and without the host, that the HTTP parser takes apart."""
MAX_HEADERS: Final = 100
"""The header fields of a request, and as many trailer fields."""
MAX_HEADER_BYTES: Final = 65536
"""Bytes of all header fields of a request together, or of all its trailer fields."""
MAX_PIPELINED: Final = 32
"""Requests of one connection that may wait for the responses to earlier ones."""


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections are served, and how long each may make the server wait."""

    max_connections: int
    """Connections at once."""
    head_seconds: float = 10
    """From the connection, or the first byte of a later request, until the head of the request is whole."""
    body_seconds: float = 20
    """In each such span a body must go on by a kibibyte, or end."""
    idle_seconds: int = 65
    """From a response until the first byte of the next request."""
    write_seconds: float = 60
    """For how long a client may take none of the bytes that wait for it."""
    discard_seconds: float = 5
    """For how long the rest of a request is read and thrown away after its response, so that the response arrives."""


class UriTooLong(ApiError):
    """The URL is longer than 65535 bytes: send shorter parameters."""

    status = 414
    code = "uri_too_long"


class HeadTooLarge(ApiError):
    """The request has more than 100 header fields or 64 KiB of them: send fewer."""

    status = 431
    code = "head_too_large"


class MalformedRequest(ApiError):
    """This is no HTTP/1.1 request: check the request line, the header fields (one Host) and the framing of the body."""

    status = 400
    code = "malformed_request"


class RequestTimeout(ApiError):
    """The request did not arrive in time: send it again, without pauses."""

    status = 408
    code = "request_timeout"
    retryable = True


class TooManyConnections(Unavailable):
    """The service has as many connections as it can serve: try again later."""

    code = "too_many_connections"
