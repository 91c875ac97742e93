"""Warnings of an engine, counted by their text: one that comes again and again takes one event and one entry."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

MAX_WARNINGS: Final = 100
"""How many warnings of different texts a job keeps."""
FURTHER_WARNINGS: Final = "further_warnings"
"""The code of the entry that counts all others."""
_MAX_TEXT_LENGTH: Final = 500


class WarningCounts:
    """The warnings of a job so far, in the order in which they first came: at most :data:`MAX_WARNINGS` texts, and an
    entry that counts the others.
    """

    def __init__(self, entries: Sequence[dict[str, Any]]) -> None:
        self._entries = {(entry["code"], entry["message"]): dict(entry) for entry in entries}

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Code, message, count, and the times of the first and the last, ISO 8601."""
        return list(self._entries.values())

    def add(self, code: str, message: str, at: datetime) -> bool:
        """Count a warning; whether it is the first of its text, so that the history is to have it."""
        key = code[:_MAX_TEXT_LENGTH], message[:_MAX_TEXT_LENGTH]
        is_first = key not in self._entries and len(self._entries) < MAX_WARNINGS
        if not is_first and key not in self._entries:
            key = FURTHER_WARNINGS, "Warnings of other texts, which are not kept."
        moment = at.isoformat()
        entry = self._entries.setdefault(
            key, {"code": key[0], "message": key[1], "count": 0, "first_at": moment, "last_at": moment}
        )
        entry["count"] += 1
        entry["last_at"] = moment
        return is_first
