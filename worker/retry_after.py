"""The header field `Retry-After` of servers that ask to be left alone for a while."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

_MAX_SECONDS: Final = 24 * 3600.0


def parse_retry_after(value: str, now: datetime) -> float | None:
    """Seconds of the header field, a number or a date, at most a day; null where it is absent or neither."""
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), _MAX_SECONDS)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(0.0, (moment - now).total_seconds()), _MAX_SECONDS)
