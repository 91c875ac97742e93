"""Rate limits: how many requests a key may send in a minute, and how fast a client may try keys that are wrong.

The counts are those of the processes that share a socket, or of all processes where the settings name a Redis server
for them. While that server does not answer, the former count.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import structlog
from anyio.to_thread import run_sync
from limits import RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import MemoryStorage, Storage, storage_from_string
from limits.strategies import FixedWindowRateLimiter

from api.problems import RateLimited
from domain.logs import LogThrottle

_WINDOW_SECONDS: Final = 60
_BATCH: Final = 64
"""How many requests of a key are counted at once, where the limit is high: a hot path must not wait for a counter."""
_MAX_KEYS: Final = 10_000
_REDIS_SECONDS: Final = 0.5
_WRONG_KEYS: Final = 10
"""Wrong keys of one client a minute that are answered at once."""
_WRONG_KEY_SECONDS: Final = 1.0
_MAX_SLOWED: Final = 8
"""Requests of one client that may wait for their answer."""

_log = structlog.get_logger(__name__)


class RequestRates:
    """Counts the requests of each key in windows of a minute. It is used from the event loop alone.

    Args:
        per_minute: the requests of one key in a minute; null: any number.
        redis_url: where all processes count together; null: those of one socket.
        own_counts: the counts of the processes of one socket; of this process alone unless given.
    """

    def __init__(self, per_minute: int | None, redis_url: str | None = None, own_counts: Storage | None = None) -> None:
        self._per_minute = per_minute
        self._item = RateLimitItemPerMinute(per_minute or 1)
        # A small limit is kept to the request, a large one to a thousandth.
        self._batch = max(1, min(_BATCH, (per_minute or 0) // 1000))
        self._prepaid: Counter[str] = Counter()
        self._own = FixedWindowRateLimiter(own_counts or MemoryStorage())
        self._shared = None if redis_url is None else FixedWindowRateLimiter(_redis_storage(redis_url))
        self._throttle = LogThrottle()

    async def admit(self, key_id: str) -> None:
        """Count a request.

        Raises:
            RateLimited: the key has sent as many as it may in this minute.
        """
        if self._per_minute is None:
            return
        if self._prepaid[key_id] > 0:
            self._prepaid[key_id] -= 1
            return
        limiter, admitted = await self._hit(key_id)
        if not admitted:
            raise self._refusal(await self._seconds_left(limiter, key_id))
        if len(self._prepaid) >= _MAX_KEYS:
            self._prepaid.clear()
        self._prepaid[key_id] = self._batch - 1

    async def _hit(self, key_id: str) -> tuple[FixedWindowRateLimiter, bool]:
        if self._shared is not None:
            try:
                return self._shared, await run_sync(self._hit_shared, key_id)
            except (StorageError, OSError) as error:
                if (suppressed := self._throttle.admit("shared")) is not None:
                    _log.warning("rate_limits_not_shared", error=type(error).__name__, suppressed=suppressed)
        try:
            return self._own, self._own.hit(self._item, key_id, cost=self._batch)
        except TimeoutError:
            # A process of this socket stands still with the lock: it is replaced within a minute.
            if (suppressed := self._throttle.admit("own")) is not None:
                _log.warning("rate_limits_not_counted", suppressed=suppressed)
            return self._own, True

    def _hit_shared(self, key_id: str) -> bool:
        assert self._shared is not None
        return self._shared.hit(self._item, key_id, cost=self._batch)

    async def _seconds_left(self, limiter: FixedWindowRateLimiter, key_id: str) -> int:
        """How long the window lasts in which the limiter has refused a request; a whole one where that is not known."""
        reset = time.time() + _WINDOW_SECONDS
        # A lock that is held by a process which stands still, or a server that was there a moment ago.
        with suppress(StorageError, OSError):
            if limiter is self._own:
                reset = limiter.get_window_stats(self._item, key_id).reset_time
            else:
                reset = (await run_sync(limiter.get_window_stats, self._item, key_id)).reset_time
        return min(max(1, math.ceil(reset - time.time())), _WINDOW_SECONDS)

    def _refusal(self, seconds: int) -> RateLimited:
        return RateLimited(
            f"The key may send {self._per_minute} requests a minute: send the next one in {seconds} s.",
            headers={
                "Retry-After": str(seconds),
                "RateLimit-Policy": f'"key";q={self._per_minute};w={_WINDOW_SECONDS}',
                "RateLimit": f'"key";r=0;t={seconds}',
            },
        )


class WrongKeyRates:
    """Slows a client down that sends wrong keys: a look-up costs the service more than the client. It is used from the
    event loop alone.

    Args:
        sleep: waits for so many seconds.
    """

    def __init__(self, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        self._limiter = FixedWindowRateLimiter(MemoryStorage())
        self._item = RateLimitItemPerMinute(_WRONG_KEYS)
        self._slowed: Counter[str] = Counter()
        self._sleep = sleep

    def count(self, client: str) -> None:
        """Count a wrong key of a client."""
        self._limiter.hit(self._item, client)

    async def slow_down(self, client: str) -> None:
        """Wait, where the client has sent many wrong keys in this minute.

        Raises:
            RateLimited: as many of its requests as may wait already.
        """
        if self._limiter.test(self._item, client):
            return
        if self._slowed[client] >= _MAX_SLOWED:
            seconds = math.ceil(_WRONG_KEY_SECONDS)
            raise RateLimited(
                f"Too many wrong keys came from this address: try again in {seconds} s.",
                headers={"Retry-After": str(seconds)},
            )
        self._slowed[client] += 1
        try:
            await self._sleep(_WRONG_KEY_SECONDS)
        finally:
            self._slowed[client] -= 1
            if not self._slowed[client]:
                del self._slowed[client]


def _redis_storage(url: str) -> Storage:
    # `limits` has another name than redis-py for the addresses of sockets.
    storage = storage_from_string(
        f"redis+{url}" if url.startswith("unix:") else url,
        socket_timeout=_REDIS_SECONDS,
        socket_connect_timeout=_REDIS_SECONDS,
        wrap_exceptions=True,
    )
    assert isinstance(storage, Storage), "an address without `async+` is that of a synchronous store"
    return storage
