"""When a request is sent again, and after how long."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

RETRIED_STATUSES: Final = frozenset({408, 429, 502, 503, 504})
"""Statuses of HTTP that say nothing of the request itself; a 500 does, so it is not sent again."""
IN_PROGRESS: Final = "idempotency_in_progress"
"""The code of a 409 that says that an earlier try of the same request is still at work."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how fast a request is sent again. Waits double, and each is a random part of its bound, so that
    the clients of a service that comes back do not all come at once."""

    attempts: int = 6
    """How often a request is sent at most; 1 for no retries."""
    first_wait: float = 0.5
    """The bound of the first wait, in seconds."""
    max_wait: float = 8.0
    """The greatest bound, in seconds."""
    max_retry_after: float = 60.0
    """The longest wait that the service may ask for with `Retry-After`, in seconds. Where it asks for more, the request
    fails at once, with that time in the error."""
    random: Callable[[], float] = random.random
    """A random number between 0 and 1."""

    def wait_after(self, attempt: int, retry_after: float | None = None) -> float | None:
        """How long to wait before the next try, in seconds; null for none.

        Args:
            attempt: which try has failed, counted from 1.
            retry_after: what the service asked for, in seconds.
        """
        if attempt >= self.attempts or (retry_after or 0) > self.max_retry_after:
            return None
        # Twice the bound would be above the largest float after a thousand attempts.
        bound = min(self.max_wait, self.first_wait * 2.0 ** min(attempt - 1, 30))
        jittered = bound * (0.5 + self.random() / 2)
        return jittered if retry_after is None else retry_after + self.random() * min(bound, 1.0)


def retry_after_of(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """The seconds that `Retry-After` names, as a number or as a date (RFC 9110, section 10.2.3); null without one that
    can be read."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - (now or datetime.now(UTC))).total_seconds())
