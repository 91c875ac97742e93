"""Authentication: every request carries a key, whose scopes say what it may do.

The head of a request decides, before a byte of its body is read.
"""

import ipaddress
from collections.abc import Collection
from functools import lru_cache
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

import structlog
from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.browser_sessions import BrowserSessions, Session, comes_from_own_page, cookie_of, is_open_page
from api.client_shares import host_of, network_of
from api.prefix import path_below_prefix
from api.principal import SAFE_METHODS, Principal
from api.problems import RateLimited, database_unavailable_response, problem_response
from api.rate_limits import RequestRates, WrongKeyRates
from api.verified_keys import Refusal, VerifiedKeys, digest_of
from domain.database_errors import DatabaseUnavailable
from domain.errors import Forbidden, InsufficientScope, Unauthenticated
from domain.logs import LogThrottle

_log = structlog.get_logger(__name__)

_OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", "/version", "/docs", "/openapi.json"})
_OPEN_DIRECTORY: Final = "/docs/"

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="bearer",
    description=(
        "A key: one of the database (`POST /v1/keys`, `python -m api keys create`), that of the settings"
        " (`POCL_API_KEY`), or that of the first start (`api-key` in `POCL_HOME`). Each operation names the scope that"
        " it needs: `read`, `submit`, which includes it, or `admin`, which includes both."
    ),
)


class OriginRefused(Forbidden):
    """With the key of its first start the service answers only programs of this machine, under a loopback name."""

    code = "origin_refused"


class CrossSiteRequest(Forbidden):
    """Another site sent this from the browser of somebody who is logged in here: do it on a page of this service."""

    code = "cross_site_request"


class ServiceAdminRequired(Forbidden):
    """This needs an admin key of the project `default`, which administers the whole service."""

    code = "service_admin_required"


RefusalReason = Literal["no_credentials", "no_bearer_key", "session_ended", Refusal]


class AuthenticationMiddleware:
    """ASGI middleware: answers 401 to a request without a key, and 403 to one whose key may not change anything, before
    its body is read.

    What a request carries is looked at nowhere else: routes get the sender as :data:`Caller`. Every path needs a key
    but for the probes, the reference and the login, also those where there is nothing. A page of the dashboard takes
    the cookie of a session in place of a key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: VerifiedKeys,
        sessions: BrowserSessions,
        rates: RequestRates,
        wrong_keys: WrongKeyRates,
    ) -> None:
        self._app = app
        self._keys = keys
        self._sessions = sessions
        self._rates = rates
        self._wrong_keys = wrong_keys
        self._throttle = LogThrottle()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        key = _bearer_key(given)
        principal = None if key is None else self._keys.find(digest_of(key))
        if principal is None:
            if _is_open(path_below_prefix(scope)):
                await self._app(scope, receive, send)
                return
            try:
                outcome = await self._look_up(given, key, scope)
            except RateLimited as error:
                await problem_response(Request(scope), error)(scope, receive, send)
                return
            except DatabaseUnavailable as error:
                await database_unavailable_response(Request(scope), error)(scope, receive, send)
                return
            if isinstance(outcome, Session):
                if scope["method"] not in SAFE_METHODS and not comes_from_own_page(Headers(scope=scope)):
                    await problem_response(Request(scope), CrossSiteRequest())(scope, receive, send)
                    return
                scope["state"]["session"] = outcome
                outcome = outcome.principal
            if not isinstance(outcome, Principal):
                self._log_refusal(outcome, scope)
                await problem_response(Request(scope), Unauthenticated())(scope, receive, send)
                return
            principal = outcome
        scope["state"]["principal"] = principal
        try:
            await self._rates.admit(principal.key_id)
        except RateLimited as error:
            await problem_response(Request(scope), error)(scope, receive, send)
            return
        if scope["method"] not in SAFE_METHODS and "submit" not in principal.scopes:
            await problem_response(Request(scope), InsufficientScope("submit"))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _look_up(
        self, given: list[bytes], key: bytes | None, scope: Scope
    ) -> Principal | Session | RefusalReason:
        client = network_of(host_of(scope))
        if key is None:
            cookie = None if given else cookie_of(scope)
            if cookie is not None:
                return await self._find_session(cookie, client)
            return "no_bearer_key" if given else "no_credentials"
        await self._wrong_keys.slow_down(client)
        outcome = await self._keys.verify(key, digest_of(key))
        if not isinstance(outcome, Principal):
            self._wrong_keys.count(client)
        return outcome

    async def _find_session(self, cookie: str, client: str) -> Session | RefusalReason:
        """The session of a cookie. One that is made up is slowed down as a wrong key is."""
        is_known = self._sessions.is_known(cookie)
        if not is_known:
            await self._wrong_keys.slow_down(client)
        session = await self._sessions.find(cookie)
        if session is None and not is_known:
            self._wrong_keys.count(client)
        return session or "session_ended"

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


async def _get_admin(caller: Annotated[Principal, Security(_get_caller)]) -> Principal:
    if "admin" not in caller.scopes:
        raise InsufficientScope("admin")
    return caller


async def _get_service_admin(caller: Annotated[Principal, Security(_get_admin)]) -> Principal:
    if not caller.administers_all:
        raise ServiceAdminRequired
    return caller


Caller = Annotated[Principal, Security(_get_caller)]
"""The sender of a request, whose key has the scope that its method needs."""
AdminCaller = Annotated[Principal, Security(_get_admin, scopes=["admin"])]
"""A sender whose key has the scope `admin`: for a route that administers the sender's own project."""
ServiceAdminCaller = Annotated[Principal, Security(_get_service_admin, scopes=["admin"])]
"""A sender with an admin key of the project `default`: for a route that administers the whole service."""


class LoopbackOnly:
    """ASGI middleware for a service on loopback with the key of its first start: refuses web pages, which a browser
    lets reach loopback, but for those of the service itself.

    A page of another site, or of another port, shows its `Origin`; a page whose name was rebound to 127.0.0.1 (DNS
    rebinding) shows that name as `Host`.

    Args:
        origins: those of further pages, which the operator named.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str] = ()) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_local(Headers(scope=scope), self._origins):
            await self._app(scope, receive, send)
            return
        # The server answers a websocket handshake that is closed with 403.
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await problem_response(Request(scope), OriginRefused())(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_OPEN_DIRECTORY) or is_open_page(path)


def _bearer_key(given: list[bytes]) -> bytes | None:
    """The key of the one `Authorization` header; null where there is none, several, or one of another scheme."""
    if len(given) != 1:
        return None
    scheme, _, key = given[0].partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


def _is_local(headers: Headers, named: Collection[str]) -> bool:
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    if len(hosts) != 1 or not _is_loopback_name(f"//{hosts[0]}"):
        return False
    # The pages of this very address alone: another program of the machine may serve pages too.
    own = (urlsplit(origin).netloc == hosts[0] and _is_loopback_name(origin) for origin in origins)
    return all(is_own or origin in named for is_own, origin in zip(own, origins, strict=True))


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
