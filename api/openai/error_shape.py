"""Errors below `/openai/v1` in the shape of OpenAI's API, `{"error": {message, type, param, code}}`, whoever raised
them.

A middleware around the whole application turns problem details into it, so that no refusal has another shape: those of
authentication, of limits, of unknown addresses and of what nobody foresaw. `x-should-retry` tells the package which of
them it need not send again; by itself it would repeat every 409.
"""

from typing import Any, Final

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import MEDIA_TYPE

PREFIX: Final = "/openai/v1"
_STATUSES: Final = {422: 400, 410: 404, 507: 503}
"""The statuses that OpenAI's API has in place of ours, by which the package chooses its exceptions."""
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PROBLEM: Final = MEDIA_TYPE.encode()


class OpenAIErrors:
    """ASGI middleware that gives errors below the prefix their shape."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The context that knows the prefix of a proxy is further inside.
        if scope["type"] != "http" or f"{PREFIX}/" not in scope["path"]:
            await self._app(scope, receive, send)
            return
        await self._app(scope, receive, _Reshaping(send))


class _Reshaping:
    """The sender of one response."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        """The head of a problem, which is sent once its body is known."""
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and dict(message["headers"]).get(b"content-type") == _PROBLEM:
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._finish(self._start)

    async def _finish(self, start: Message) -> None:
        sent = int(start["status"])
        status = _STATUSES.get(sent, sent)
        # The response to HEAD has no body.
        problem = orjson.loads(self._body) if self._body else None
        body = b"" if problem is None else orjson.dumps({"error": error_content(problem, status)})
        replaced = (b"content-type", b"content-length")
        headers = [(name, value) for name, value in start["headers"] if name not in replaced]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if problem is not None and not problem["retryable"] and status < 500:
            headers.append((b"x-should-retry", b"false"))
        await self._send({**start, "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def error_content(problem: dict[str, Any], status: int) -> dict[str, Any]:
    """The content of `error` for problem details.

    Args:
        status: the status that is sent.
    """
    errors = problem.get("errors") or []
    places = [f"{_parameter(each['pointer']) or 'the body'}: {each['detail']}" for each in errors]
    fallback = "server_error" if status >= 500 else "invalid_request_error"
    return {
        "message": " ".join([problem["detail"], *(f"({place})" for place in places)]),
        "type": _TYPES.get(status, fallback),
        "param": (_parameter(errors[0]["pointer"]) or None) if errors else None,
        "code": problem["code"],
        "request_id": problem["request_id"],
    }


def _parameter(pointer: str) -> str:
    """A pointer as OpenAI's API names parameters: `method.distillation.teacher`."""
    parts = pointer.removeprefix("/").split("/")
    return ".".join(part.replace("~1", "/").replace("~0", "~") for part in parts)
