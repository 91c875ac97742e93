"""Who asks: a static bearer key, or without one only programs of this machine."""

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import problem_response
from domain.errors import Forbidden, Unauthenticated
from domain.settings import Settings

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="bearer",
    description="The key that the service was started with (`POCL_API_KEY`). Without one only loopback is served.",
)


class OriginRefused(Forbidden):
    """Without a key the service answers only programs of this machine, under a loopback name."""

    code = "origin_refused"


@dataclass(frozen=True)
class Principal:
    """Who sent a request."""

    project: str
    """Rows of other projects do not exist for it."""


async def authenticate(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Principal:
    """The sender of a request.

    Raises:
        Unauthenticated: the service has a key, and the request does not carry it.
    """
    settings: Settings = request.app.state.settings
    if settings.api_key is not None:
        offered = credentials.credentials if credentials is not None else ""
        if not _same(offered, settings.api_key.get_secret_value()):
            raise Unauthenticated
    return Principal(project="default")


async def identify(request: Request) -> Principal:
    """The sender of a request that no route has taken; raises as :func:`authenticate` does."""
    return await authenticate(request, await _bearer(request))


Caller = Annotated[Principal, Security(authenticate)]


class LoopbackOnly:
    """ASGI middleware for a service without a key: refuses web pages, which a browser lets reach loopback.

    A page of another site shows its `Origin`; one whose name was rebound to 127.0.0.1 shows that name as `Host`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_local(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        # A refused websocket handshake is answered with 403 by the server once it is closed.
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await problem_response(Request(scope), OriginRefused())(scope, receive, send)


def _same(offered: str, expected: str) -> bool:
    # Digests are of one length, so the time tells nothing of the key, not even its length.
    return hmac.compare_digest(_digest(offered), _digest(expected))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _is_local(headers: Headers) -> bool:
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    if len(hosts) != 1 or not _is_loopback_name(f"//{hosts[0]}"):
        return False
    return all(_is_loopback_name(origin) for origin in origins)


def _is_loopback_name(url: str) -> bool:
    try:
        name = urlsplit(url).hostname
    except ValueError:
        return False
    if name is None:
        return False
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
