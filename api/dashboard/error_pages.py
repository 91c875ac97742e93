"""Errors as pages: what the API answers as problem details, a browser is shown as a page or a notice."""

import json
from typing import Any, Final
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.browser_sessions import LOGIN_PATH, is_page
from api.dashboard.rendering import FRAGMENT_HEADER, base_of, page_headers, render_text
from api.prefix import path_below_prefix
from api.principal import SAFE_METHODS
from api.problems import MEDIA_TYPE

_HTML: Final = "text/html"


class ErrorPages:
    """ASGI middleware: shows a browser the problem details of a page of the dashboard as HTML, and the login where a
    session has ended. Everybody who does not accept HTML gets them as they are.

    Args:
        root_path: the prefix under which a proxy serves the application.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_for_people(scope):
            await self._app(scope, receive, _ProblemPage(scope, send, self._root_path).send)
        else:
            await self._app(scope, receive, send)

    def _is_for_people(self, scope: Scope) -> bool:
        path = path_below_prefix({**scope, "root_path": self._root_path or scope.get("root_path", "")})
        headers = Headers(scope=scope)
        return is_page(path) and (_HTML in headers.get("accept", "") or FRAGMENT_HEADER in headers)


class _ProblemPage:
    """One response: passed on as it is, unless it is problem details."""

    def __init__(self, scope: Scope, send: Send, root_path: str) -> None:
        self._scope, self._send = scope, send
        self._root_path = root_path
        self._start: Message | None = None
        self._body = bytearray()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if Headers(raw=message["headers"]).get("content-type") == MEDIA_TYPE:
                self._start = message
                return
        elif self._start is not None:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            content = self._convert(self._start, bytes(self._body))
            await self._send(self._start)
            await self._send({**message, "body": content})
            return
        await self._send(message)

    def _convert(self, start: Message, body: bytes) -> bytes:
        """The body of the page; the head of the response is changed in place."""
        problem: dict[str, Any] = json.loads(body) if body else {}
        asked = Headers(scope=self._scope)
        is_fragment = FRAGMENT_HEADER in asked
        scope = {**self._scope, "root_path": self._root_path or self._scope.get("root_path", "")}
        headers = MutableHeaders(raw=list(start["headers"]))
        content = b""
        if start["status"] == 401:
            login = f"{base_of(scope)}{LOGIN_PATH}{_next_page(self._scope, path_below_prefix(scope), is_fragment)}"
            start["status"] = 204 if is_fragment else 303
            headers["hx-redirect" if is_fragment else "location"] = login
            del headers["www-authenticate"]
            del headers["content-type"]
        else:
            template = "notice.html" if is_fragment else "error.html"
            content = render_text(scope, template, status=start["status"], problem=problem).encode()
            headers["content-type"] = "text/html; charset=utf-8"
        for name, value in page_headers().items():
            headers[name] = value
        del headers["content-length"]
        if start["status"] != 204:
            headers["content-length"] = str(len(content))
        start["headers"] = headers.raw
        return b"" if self._scope["method"] == "HEAD" else content


def _next_page(scope: Scope, path: str, is_fragment: bool) -> str:
    """The query that leads back here after the login, where somebody looked at a page."""
    if is_fragment or scope["method"] not in SAFE_METHODS or path == "/":
        return ""
    query = scope["query_string"].decode("latin-1")
    return f"?next={quote(path + (f'?{query}' if query else ''), safe='/')}"
