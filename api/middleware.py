"""The context of every request: its id, what its log lines have in common, and a problem response where something
unforeseen was raised.
"""

import random
import re

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import internal_error_response, problem_response
from api.url_limit import UriTooLong, is_too_long

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_JOB_PATH = re.compile(r"/v1/jobs/(job_[0-9a-z]{8,40})(?:/|$)")

_log = structlog.get_logger(__name__)


class RequestContextMiddleware:
    """ASGI middleware; the outermost one, so that no response leaves without an id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get(REQUEST_ID_HEADER))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        context = {"request_id": request_id}
        job = _JOB_PATH.match(scope["path"])
        if job is not None:
            context["job_id"] = job[1]
        with structlog.contextvars.bound_contextvars(**context):
            if is_too_long(scope):
                await problem_response(Request(scope), UriTooLong())(scope, receive, send_with_id)
                return
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                # The last resort: the response tells nothing of the error, the log tells all.
                _log.exception("request_failed", method=scope["method"])
                if started:
                    # Half a response is out: only a broken connection tells the client.
                    raise
                response = internal_error_response(Request(scope))
                await response(scope, receive, send_with_id)


def _request_id(given: str | None) -> str:
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    # The id is no secret, and asking the system for randomness is a fifth of what a poll costs.
    return f"{random.getrandbits(128):032x}"
