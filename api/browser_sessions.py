"""Browsers that are logged in with a key: each request of the dashboard carries a cookie in place of the key.

A session is as good as its key: what may be done follows from the key at every request, and a key that is revoked,
rotated or expired ends its sessions. The cookie is accepted for pages alone, never below `/v1`.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Final
from urllib.parse import urlsplit

from anyio import CapacityLimiter
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync
from starlette.datastructures import Headers
from starlette.types import Scope

from api.prefix import path_below_prefix
from api.principal import Principal
from api.verified_keys import LIFE_SECONDS, VerifiedKeys, digest_of
from domain.browser_sessions import repository
from domain.browser_sessions.repository import FoundSession
from domain.db import Database

COOKIE: Final = "pocl_session"
PAGES: Final = "/ui/"
"""The paths of the dashboard begin with this; its first page is `/`."""
LOGIN_PATH: Final = "/ui/login"
_OPEN_PAGES: Final = frozenset({LOGIN_PATH, "/ui/logout"})
_OPEN_DIRECTORY: Final = "/ui/static/"
_MAX_SESSIONS: Final = 10_000
_MAX_TOKEN: Final = 64
_THREADS: Final = 4
"""Look-ups at a time, in threads of their own: strangers take none from those who are logged in."""


@dataclass(frozen=True)
class Session:
    """A browser that is logged in."""

    token: str = field(repr=False)
    principal: Principal

    @property
    def form_token(self) -> str:
        """What the forms of its pages carry, so that no other site can make one."""
        return form_token(self.token)


@dataclass(frozen=True)
class _Entry:
    found: FoundSession
    read_at: float
    """Monotonic seconds."""


class BrowserSessions:
    """The sessions that this process has seen lately, by their token. It is used from the event loop alone.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, database: Database, keys: VerifiedKeys, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._keys = keys
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._threads: RunVar[CapacityLimiter] = RunVar("session_threads")

    async def begin(self, key: bytes, principal: Principal) -> str:
        """Begin a session of a key that was verified; its token.

        Raises:
            DatabaseUnavailable: it cannot be recorded.
        """

        def write() -> str:
            with self._database.transaction(write=True) as session:
                return repository.begin_session(session, key_id=principal.key_id, key_digest=digest_of(key))

        return await run_sync(write, limiter=self._limiter)

    def is_known(self, token: str) -> bool:
        """Whether there was a session of this token when it was last looked up."""
        return digest_of(token.encode()) in self._entries

    async def find(self, token: str) -> Session | None:
        """The session of a token; null where it has ended, or its key is accepted no more.

        Raises:
            DatabaseUnavailable: it is not known.
        """
        found = await self._find(token)
        if found is None:
            return None
        principal = self._keys.find(found.key_digest)
        if principal is None:
            outcome = await self._keys.verify_digest(found.key_id, found.key_digest)
            if not isinstance(outcome, Principal):
                return None
            principal = outcome
        return Session(token, principal)

    async def end(self, token: str) -> None:
        """End a session; other processes forget it within :data:`~api.verified_keys.LIFE_SECONDS`.

        Raises:
            DatabaseUnavailable: it cannot be recorded.
        """

        def write() -> None:
            with self._database.transaction(write=True) as session:
                repository.end_session(session, token)

        self._entries.pop(digest_of(token.encode()), None)
        await run_sync(write, limiter=self._limiter)

    async def _find(self, token: str) -> FoundSession | None:
        name, now = digest_of(token.encode()), self._clock()
        entry = self._entries.get(name)
        if entry is not None and now - entry.read_at < LIFE_SECONDS:
            return entry.found

        def read() -> FoundSession | None:
            with self._database.transaction(write=False) as session:
                return repository.find_session(session, token)

        found = await run_sync(read, limiter=self._limiter)
        if found is None:
            self._entries.pop(name, None)
            return None
        self._entries[name] = _Entry(found, now)
        self._entries.move_to_end(name)
        while len(self._entries) > _MAX_SESSIONS:
            self._entries.popitem(last=False)
        return found

    @property
    def _limiter(self) -> CapacityLimiter:
        limiter = self._threads.get(None)
        if limiter is None:
            limiter = CapacityLimiter(_THREADS)
            self._threads.set(limiter)
        return limiter


def form_token(token: str) -> str:
    """What the forms of a session carry. The token of the session cannot be found from it."""
    return hashlib.sha256(b"pocl form\0" + token.encode()).hexdigest()


def is_page(path: str) -> bool:
    """Whether a path is one of the dashboard."""
    return path == "/" or path.startswith(PAGES)


def is_open_page(path: str) -> bool:
    """Whether a page is for everybody: what is needed to log in."""
    return path in _OPEN_PAGES or path.startswith(_OPEN_DIRECTORY)


def cookie_of(scope: Scope) -> str | None:
    """The token in the cookie of a request to a page; null without a plausible one."""
    if not is_page(path_below_prefix(scope)):
        return None
    for name, value in scope["headers"]:
        if name == b"cookie":
            try:
                morsel = SimpleCookie(value.decode("latin-1")).get(COOKIE)
            except CookieError:
                continue
            if morsel is not None and 0 < len(morsel.value) <= _MAX_TOKEN and morsel.value.isascii():
                return morsel.value
    return None


def comes_from_own_page(headers: Headers) -> bool:
    """Whether a request that changes something comes from a page of this service, as browsers say it themselves."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin, host = headers.get("origin"), headers.get("host")
    return origin is not None and host is not None and urlsplit(origin).netloc == host
