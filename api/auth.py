"""Authentication: a static bearer key, or without one only programs of this machine.

The head of a request decides, before a byte of its body is read.
"""

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

import structlog
from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.client_shares import host_of
from api.prefix import path_below_prefix
from api.problems import problem_response
from domain.errors import Forbidden, Unauthenticated
from domain.logs import LogThrottle

_log = structlog.get_logger(__name__)

_OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})
_OPEN_DIRECTORY: Final = "/docs/"

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
    key_id: str | None = None
    """Names the key of the sender in logs; null for a service without a key."""


RefusalReason = Literal["no_credentials", "no_bearer_key", "wrong_key"]


class AuthenticationMiddleware:
    """ASGI middleware: answers 401 to a request without the key, before its body is read.

    What a request carries is looked at nowhere else: routes get the sender as :data:`Caller`. Every path needs the key
    but for the probes and the reference, also those where there is nothing.

    Args:
        api_key: null where every program of this machine may do everything.
    """

    def __init__(self, app: ASGIApp, api_key: SecretStr | None) -> None:
        self._app = app
        self._key_digest = None if api_key is None else _digest(api_key.get_secret_value().encode())
        # One for all requests: the static key names nobody in particular.
        self._principal = Principal(project="default", key_id=None if api_key is None else "static")
        self._throttle = LogThrottle()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(scope)
            if refusal is None:
                scope["state"]["principal"] = self._principal
            elif not _is_open(path_below_prefix(scope)):
                self._log_refusal(refusal, scope)
                await problem_response(Request(scope), Unauthenticated())(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RefusalReason | None:
        """Why the sender is not known; null where it is."""
        if self._key_digest is None:
            return None
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:
            return "no_credentials"
        scheme, _, key = given[0].partition(b" ")
        if len(given) > 1 or scheme.lower() != b"bearer":
            return "no_bearer_key"
        # In constant time; digests are of one length, so the time does not even tell the length of the key.
        return None if hmac.compare_digest(_digest(key.strip()), self._key_digest) else "wrong_key"

    def _log_refusal(self, reason: RefusalReason, scope: Scope) -> None:
        suppressed = self._throttle.admit(reason)
        if suppressed is not None:
            _log.warning(
                "authentication_refused",
                reason=reason,
                client=host_of(scope),
                method=scope["method"],
                suppressed=suppressed,
            )


def principal_of(request: Request) -> Principal:
    """The sender of a request, as :class:`AuthenticationMiddleware` found it.

    Raises:
        Unauthenticated: it found none, since the path is open to everybody.
    """
    principal: Principal | None = getattr(request.state, "principal", None)
    if principal is None:
        raise Unauthenticated
    return principal


async def _get_caller(
    request: Request,
    # Read by the middleware; this documents it.
    _credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
) -> Principal:
    return principal_of(request)


Caller = Annotated[Principal, Security(_get_caller)]


class LoopbackOnly:
    """ASGI middleware for a service without a key: refuses web pages, which a browser lets reach loopback, but for
    those of the service itself.

    A page of another site, or of another port, shows its `Origin`; a page whose name was rebound to 127.0.0.1 (DNS
    rebinding) shows that name as `Host`.
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


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_OPEN_DIRECTORY)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_local(headers: Headers) -> bool:
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    if len(hosts) != 1 or not _is_loopback_name(f"//{hosts[0]}"):
        return False
    # The pages of this very address alone: another program of the machine may serve pages too.
    return all(urlsplit(origin).netloc == hosts[0] and _is_loopback_name(origin) for origin in origins)


# Nearly all requests have one of a few names; a stranger fills the cache with 64 of at most 64 KiB.
@lru_cache(maxsize=64)
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
