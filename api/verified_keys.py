"""The keys that this process has verified, so that a request costs a look-up in a dictionary.

A key of the database or of `POCL_HOME` is looked up again while it is used, beside the requests that use it. So what is
revoked, rotated or expired is refused by every process at most :data:`LIFE_SECONDS` later.
"""

import asyncio
import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import structlog
from anyio.to_thread import run_sync
from pydantic import SecretStr

from api.loop_limiters import LoopLimiter
from api.principal import Principal
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.environment import SettingsInvalid
from domain.keys import repository
from domain.keys.models import SCOPES_INCLUDED, Scope
from domain.keys.repository import KeyRefusal, VerifiedKey
from domain.keys.tokens import parse_token
from domain.local_key import read_local_key
from domain.projects.models import DEFAULT_PROJECT

LIFE_SECONDS: Final = 5.0
"""For how long a key counts as it was when it was last looked up."""
_REFRESH_SECONDS: Final = 2.5
"""The age from which on a key that is used is looked up again."""
_MAX_KEYS: Final = 10_000
_THREADS: Final = 4
"""Look-ups at a time. They have threads of their own, so that strangers take none from those whose key is known."""
_STATIC: Final = "static"
_LOCAL: Final = "local"
_ROW_PREFIX: Final = "key_"
"""Of the ids of keys that have a row."""

Refusal = Literal["wrong_key", KeyRefusal]

_log = structlog.get_logger(__name__)


@dataclass
class _Entry:
    principal: Principal
    verified_at: float
    """Monotonic seconds; infinite for the key of the settings, which never changes."""
    is_looked_up: bool = False


class VerifiedKeys:
    """A bounded cache of senders by the SHA-256 of their key. It is used from the event loop alone.

    Args:
        api_key: the key of the settings; null for none.
        home: where the key of the first start is; it counts where the settings have none.
        clock: monotonic seconds.
    """

    def __init__(
        self, database: Database, api_key: SecretStr | None, home: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._home = home if api_key is None else None
        self._clock = clock
        self._static = None if api_key is None else digest_of(api_key.get_secret_value().encode())
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._threads = LoopLimiter("key_threads", _THREADS)
        self._tasks: set[asyncio.Task[None]] = set()

    def find(self, digest: bytes) -> Principal | None:
        """The sender whose key has this digest; null unless it was verified lately."""
        entry = self._entries.get(digest)
        if entry is None:
            return None
        age = self._clock() - entry.verified_at
        if age < _REFRESH_SECONDS:
            return entry.principal
        if age >= LIFE_SECONDS:
            return None
        if not entry.is_looked_up:
            entry.is_looked_up = True
            self._begin(self._refresh(digest, entry))
        return entry.principal

    async def verify(self, key: bytes, digest: bytes) -> Principal | Refusal:
        """Look a key up, and remember it where it is accepted.

        Args:
            digest: the SHA-256 of the key.

        Raises:
            DatabaseUnavailable: it is not known whether the key is accepted.
        """
        token = parse_token(key.decode("ascii", errors="replace"))
        return await self.verify_digest("" if token is None else token.key_id, digest)

    async def verify_digest(self, key_id: str, digest: bytes) -> Principal | Refusal:
        """The same for a key of which only the id and the digest are known.

        Args:
            key_id: of its row, where it has one; else any other text.
            digest: the SHA-256 of the key.

        Raises:
            DatabaseUnavailable: it is not known whether the key is accepted.
        """
        # In constant time; digests are of one length, so the time does not even tell the length of the key.
        if self._static is not None and hmac.compare_digest(digest, self._static):
            self._remember(digest, _principal(_STATIC, DEFAULT_PROJECT, ("admin",)), float("inf"))
            return self._entries[digest].principal
        if await self._is_local(digest):
            self._remember(digest, _principal(_LOCAL, DEFAULT_PROJECT, ("admin",)), self._clock())
            return self._entries[digest].principal
        return await self._look_up(key_id, digest) if key_id.startswith(_ROW_PREFIX) else "wrong_key"

    async def aclose(self) -> None:
        """Wait for look-ups that are under way, which use the database."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _look_up(self, key_id: str, digest: bytes) -> Principal | Refusal:
        asked_at = self._clock()
        verified = await run_sync(self._read, key_id, digest.hex(), limiter=self._threads.get())
        if not isinstance(verified, VerifiedKey):
            return verified
        principal = _principal(verified.key_id, verified.project, verified.scopes)
        # As old as the moment before the rows were read.
        self._remember(digest, principal, asked_at)
        if verified.use_is_due:
            self._begin(self._record_use(verified.key_id))
        return principal

    async def _refresh(self, digest: bytes, entry: _Entry) -> None:
        key_id = entry.principal.key_id
        try:
            if key_id == _LOCAL:
                if await self._is_local(digest):
                    self._remember(digest, entry.principal, self._clock())
                    return
            elif isinstance(await self._look_up(key_id, digest), Principal):
                return
            self._entries.pop(digest, None)
        except DatabaseUnavailable:
            # It expires, unless a later request finds the database answering.
            entry.is_looked_up = False

    async def _record_use(self, key_id: str) -> None:
        try:
            await run_sync(self._write_use, key_id, limiter=self._threads.get())
        except DatabaseUnavailable as error:
            _log.warning("key_use_not_recorded", key=key_id, error=str(error))

    async def _is_local(self, digest: bytes) -> bool:
        if self._home is None:
            return False
        try:
            key = await run_sync(read_local_key, self._home, limiter=self._threads.get())
        except SettingsInvalid as error:
            _log.warning("local_key_refused", reason=str(error))
            return False
        return key is not None and hmac.compare_digest(digest, digest_of(key.encode()))

    def _read(self, key_id: str, token_sha256: str) -> VerifiedKey | KeyRefusal:
        with self._database.transaction(write=False) as session:
            return repository.verify(session, key_id, token_sha256)

    def _write_use(self, key_id: str) -> None:
        with self._database.transaction(write=True) as session:
            repository.record_use(session, key_id)

    def _remember(self, digest: bytes, principal: Principal, verified_at: float) -> None:
        self._entries[digest] = _Entry(principal, verified_at)
        self._entries.move_to_end(digest)
        while len(self._entries) > _MAX_KEYS:
            self._entries.popitem(last=False)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        # The event loop itself keeps no reference to a task.
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def digest_of(key: bytes) -> bytes:
    """The SHA-256 of a key."""
    return hashlib.sha256(key).digest()


def _principal(key_id: str, project: str, scopes: Sequence[Scope]) -> Principal:
    included = frozenset[Scope]().union(*(SCOPES_INCLUDED[scope] for scope in scopes))
    return Principal(project, included, key_id)
