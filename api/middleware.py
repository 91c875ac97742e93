"""The context of every request: its id, what its log lines have in common, its lines in the access log and the audit
log, the header fields that all responses have, and a problem response where something unforeseen was raised.
"""

import random
import re
import time
from typing import Any, Final

import structlog
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.access_log import AccessLog
from api.client_shares import host_of
from api.metrics.recorder import MetricsRecorder
from api.prefix import path_below_prefix
from api.principal import SAFE_METHODS
from api.problems import internal_error_response
from api.security_headers import add_security_headers

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID_NAME: Final = REQUEST_ID_HEADER.encode()
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_JOB_PATH = re.compile(r"/v1/jobs/(job_[0-9a-z]{8,40})(?:/|$)")
_MAX_LOGGED_PATH: Final = 200

_log = structlog.get_logger(__name__)


class RequestContextMiddleware:
    """ASGI middleware; the outermost one, so that no response leaves without an id and a line in the log.

    Args:
        access_log: null for none.
        metrics: records the request.
        root_path: the prefix under which a proxy serves the application.
    """

    def __init__(
        self,
        app: ASGIApp,
        access_log: AccessLog | None = None,
        metrics: MetricsRecorder | None = None,
        root_path: str = "",
    ) -> None:
        self._app = app
        self._access_log = access_log
        self._metrics = metrics or MetricsRecorder()
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._root_path:
            scope["root_path"] = self._root_path
        exchange = _Exchange(scope, receive, send)
        self._metrics.begin_request()
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        context = {"request_id": exchange.request_id}
        job = _JOB_PATH.match(path_below_prefix(scope))
        if job is not None:
            context["job_id"] = job[1]
        with structlog.contextvars.bound_contextvars(**context):
            try:
                await self._app(scope, exchange.receive if exchange.has_body else receive, exchange.send)
            except Exception:
                # The last resort: the response tells nothing of the error, the log tells all.
                _log.exception("request_failed", method=scope["method"])
                if exchange.status is not None:
                    # Half a response is out: only a broken connection tells the client.
                    raise
                response = internal_error_response(Request(scope))
                await response(scope, receive, exchange.send)
            finally:
                route = exchange.route()
                self._metrics.end_request(
                    scope["method"], exchange.label_of(route), exchange.status, exchange.head_seconds()
                )
                if self._access_log is not None:
                    self._access_log.add(exchange.status, exchange.access_fields(route))
                if scope["method"] not in SAFE_METHODS and "principal" in scope["state"]:
                    _log.info("audit", **exchange.audit_fields())


class _Exchange:
    """One request and its response, as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._began = time.perf_counter()
        self._answered = 0.0
        self.request_id = ""
        self.has_body = False
        """Whether the head announces a body."""
        self.status: int | None = None
        self._expects_continue = self._body_is_read = False
        self._bytes_in = self._bytes_out = 0
        self._location = b""
        for name, value in scope["headers"]:
            if name == _REQUEST_ID_NAME:
                self.request_id = value.decode() if _REQUEST_ID.fullmatch(value) else ""
            elif name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
                self.has_body = True
            elif name == b"expect":
                self._expects_continue = True
        if not self.request_id:
            # The id is no secret, and asking the system for randomness is a fifth of what a poll costs.
            self.request_id = f"{random.getrandbits(128):032x}"

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._bytes_in += len(message.get("body", b""))
            self._body_is_read = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._answered = time.perf_counter()
            self._complete_headers(message)
        else:
            self._bytes_out += len(message.get("body", b""))
        await self._send(message)

    def _complete_headers(self, message: Message) -> None:
        headers: list[tuple[bytes, bytes]] = list(message.get("headers", ()))
        self._location = next((value for name, value in headers if name == b"location"), b"")
        headers.append((_REQUEST_ID_NAME, self.request_id.encode()))
        add_security_headers(headers)
        if self.has_body and not self._body_is_read and (message["status"] >= 400 or self._expects_continue):
            # The client need not send the rest, or waits for leave to send it: what it sends next would be ambiguous.
            headers.append((b"connection", b"close"))
        message["headers"] = headers

    def label_of(self, route: str | None) -> str | None:
        """The route as metrics have it: a long poll, which takes as long as the client likes, has one of its own."""
        return f"{route}?wait" if self._scope["state"].get("waits") else route

    def head_seconds(self) -> float:
        """The time from the head of the request to that of the response; to now where there is none."""
        return (self._answered or time.perf_counter()) - self._began

    def access_fields(self, route: str | None) -> dict[str, Any]:
        fields = {
            "method": self._scope["method"],
            "route": route,
            "milliseconds": round((time.perf_counter() - self._began) * 1000, 2),
            "bytes_in": self._bytes_in,
            "bytes_out": self._bytes_out,
            "request_id": self.request_id,
            **self._sender(),
        }
        if route is None:
            fields["path"] = path_below_prefix(self._scope)[:_MAX_LOGGED_PATH]
        return fields

    def audit_fields(self) -> dict[str, Any]:
        """Who did what to which object."""
        objects = dict(self._scope.get("path_params", {}))
        if self._location:
            objects["created"] = self._location.rpartition(b"/")[2].decode("latin-1")
        return {
            "action": getattr(self._scope.get("route"), "name", None),
            "method": self._scope["method"],
            "objects": objects,
            "status": self.status,
            **self._sender(),
        }

    def _sender(self) -> dict[str, Any]:
        principal = self._scope["state"].get("principal")
        return {
            "client": host_of(self._scope),
            "key": getattr(principal, "key_id", None),
            "project": getattr(principal, "project", None),
        }

    def route(self) -> str | None:
        """The template of the path: `/v1/jobs/{job_id}`."""
        known: str | None = self._scope["state"].get("route")
        if known is not None:
            return known
        path: str | None = getattr(self._scope.get("route"), "path", None)
        # Routes are included below the version, which their own templates lack.
        return f"/v1{path}" if path is not None and path_below_prefix(self._scope).startswith("/v1/") else path
