"""A position in the stream of a job, as the ids of its messages carry it."""

import re
from dataclasses import dataclass, replace
from typing import Final, Self

_PATTERN: Final = re.compile(r"(\d{1,10})(?:\.(\d{1,10})\.(\d{1,18})\.(\d{1,10}))?")
_MAX_NUMBER: Final = 2**31 - 1
_MAX_OFFSET: Final = 2**60


@dataclass(frozen=True)
class StreamCursor:
    """What of a job's stream was sent: its history, its logs and its metrics up to here."""

    after: int = 0
    """The number of the last event of the history."""
    attempt: int = 0
    """The attempt whose log was sent last."""
    offset: int = 0
    """The offset up to which it was sent."""
    step: int = 0
    """The optimiser step whose metrics were sent last."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The position that the id of a message names.

        Raises:
            ValueError: no message has such an id.
        """
        match = _PATTERN.fullmatch(text)
        after, attempt, offset, step = (int(part or 0) for part in match.groups()) if match else (-1, 0, 0, 0)
        if not 0 <= after <= _MAX_NUMBER or max(attempt, step) > _MAX_NUMBER or offset > _MAX_OFFSET:
            raise ValueError("send the id of a message of this stream")
        return cls(after, attempt, offset, step)

    def encode(self) -> str:
        """The id of a message after which the stream is here."""
        return f"{self.after}.{self.attempt}.{self.offset}.{self.step}"

    def moved(self, **fields: int) -> Self:
        """The position with other values in these fields."""
        return replace(self, **fields)
