"""Authentication: a static bearer key, or without one only programs of this machine."""

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

from api.dependencies import SettingsDep, settings_of
from api.problems import problem_response
from domain.errors import Forbidden, Unauthenticated

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="bearer",
    description="The key that the service was started with (`POCL_API_KEY`). Without a key only loopback is served.",
)


class OriginRefused(Forbidden):
    """Without a key the service answers only programs of this machine, under a loopback name."""

    code = "origin_refused"


@dataclass(frozen=True)
class Principal:
    """Who sent a request."""

    project: str
    """The project of the sender, who sees no rows of others."""


async def authenticate(
    settings: SettingsDep, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Principal:
    """The sender of a request.

    Raises:
        Unauthenticated: the service has a key, and the request does not carry it.
    """
    if settings.api_key is not None:
        key = credentials.credentials if credentials is not None else ""
        if not _keys_equal(key, settings.api_key.get_secret_value()):
            raise Unauthenticated
    return Principal(project="default")


async def authenticate_request(request: Request) -> Principal:
    """The sender of a request that did not go through the router; raises as :func:`authenticate` does."""
    return await authenticate(settings_of(request), await _bearer(request))


Caller = Annotated[Principal, Security(authenticate)]


class LoopbackOnly:
    """ASGI middleware for a service without a key: refuses web pages, which a browser lets reach loopback.

    A page of another site shows its `Origin`; a page whose name was rebound to 127.0.0.1 (DNS rebinding) shows that
    name as `Host`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_local(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        # The server answers a websocket handshake that is closed with 403.
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await problem_response(Request(scope), OriginRefused())(scope, receive, send)


def _keys_equal(given: str, expected: str) -> bool:
    # In constant time; digests are of one length, so the time does not even tell the length of the key.
    return hmac.compare_digest(_digest(given), _digest(expected))


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
