"""The access log: one JSON line on stderr for each response, shaped as all other lines of the log.

A poll takes half a millisecond, of which the logging library would take a tenth. So lines are made here, and written
together a few times a second.
"""

import asyncio
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import orjson

_FLUSH_SECONDS: Final = 0.2
_MAX_BYTES: Final = 65536
"""Lines of so many bytes are written at once."""
_COMMON: Final = {"event": "request", "logger": "api.access"}


class AccessLog:
    """Collects the lines of responses, and writes them. It is used from the event loop alone.

    Args:
        write: takes whole lines; stderr unless given.
        only_errors: whether responses below 400 are left out.
    """

    def __init__(self, write: Callable[[bytes], object] | None = None, *, only_errors: bool = False) -> None:
        self._write = write or _write_to_stderr
        self._only_errors = only_errors
        self._lines: list[bytes] = []
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, status: int | None, fields: dict[str, Any]) -> None:
        """Log a response.

        Args:
            status: the HTTP status; null where the client was gone before there was a response.
        """
        if self._only_errors and status is not None and status < 400:
            return
        line = orjson.dumps(
            {
                **_COMMON,
                "level": "info" if status is None or status < 500 else "warning",
                "status": status,
                **fields,
                "timestamp": datetime.now(UTC),
            },
            option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z,
        )
        self._lines.append(line)
        self._bytes += len(line)
        if self._bytes >= _MAX_BYTES:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        """Write the lines that are due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines, self._bytes = b"".join(self._lines), [], 0
        if lines:
            self._write(lines)


def _write_to_stderr(lines: bytes) -> None:
    sys.stderr.buffer.write(lines)
    sys.stderr.buffer.flush()
