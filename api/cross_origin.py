"""Cross-origin resource sharing: web pages of origins that the operator names may use the API with a key of their own.

No cookie is taken from them and none is set for them: what such a page may do, the key that it sends says.
"""

from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

_METHODS: Final = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
EXPOSED_HEADERS: Final = (
    *("Accept-Ranges", "Content-Disposition", "Content-Range", "ETag", "Idempotent-Replayed", "Location"),
    *("Log-Attempt", "Log-First-Offset", "Log-Next-Offset", "Log-Offset", "Log-Size"),
    *("Repr-Digest", "Retry-After", "WWW-Authenticate", "X-File-Size", "X-Request-Id"),
)
"""The header fields of responses that a page may read."""
_PREFLIGHT_SECONDS: Final = 600


class NamedOrigins:
    """ASGI middleware: answers the preflights of pages of the named origins, and lets them read responses. To all other
    requests nothing is added, so that browsers keep the responses from other pages.

    Args:
        origins: scheme, host and port, as browsers send them.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)
        self._sharing = CORSMiddleware(
            app,
            allow_origins=sorted(self._origins),
            allow_methods=_METHODS,
            # Whichever a page asks for: no header field has a meaning without the key.
            allow_headers=["*"],
            allow_credentials=False,
            expose_headers=EXPOSED_HEADERS,
            max_age=_PREFLIGHT_SECONDS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_shared = scope["type"] == "http" and self._shares(Headers(scope=scope))
        await (self._sharing if is_shared else self._app)(scope, receive, send)

    def _shares(self, headers: Headers) -> bool:
        # Of an unknown method the service says in its own words that there is none.
        is_known = headers.get("access-control-request-method", _METHODS[0]) in _METHODS
        origins = headers.getlist("origin")
        return is_known and len(origins) == 1 and origins[0] in self._origins
