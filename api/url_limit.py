"""The limit on the length of a URL: a longer one is answered with problem details, and is not held in memory."""

from typing import Final

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from domain.errors import ApiError

MAX_URL_BYTES: Final = 65535
"""The longest URL, percent-encoded and without the host, that the HTTP parser takes apart."""
_MARK: Final = "uri_too_long"


class UriTooLong(ApiError):
    """The URL is longer than 65535 bytes: send shorter parameters."""

    status = 414
    code = "uri_too_long"


class UrlLimitProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP protocol, which would hold a URL of any length, and answer a long one with 400 in plain text.

    A URL that is too long is replaced by `/`, and the application is told so: see :func:`is_too_long`.
    """

    def on_url(self, url: bytes) -> None:
        if len(self.url) <= MAX_URL_BYTES:
            super().on_url(url)

    def on_headers_complete(self) -> None:
        if len(self.url) > MAX_URL_BYTES:
            self.url = b"/"
            self.scope["state"][_MARK] = True
        super().on_headers_complete()


def is_too_long(scope: Scope) -> bool:
    """Whether the URL of the request of this scope was too long, so that the scope has another one."""
    return bool(scope.get("state", {}).get(_MARK))
