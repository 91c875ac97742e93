"""Logs as JSON lines on stderr, those of libraries included."""

import logging
import logging.config
import re
import time
from collections.abc import Callable
from typing import Final

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

_SHARED: Final[list[Processor]] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
]

_JSON: Final = structlog.processors.JSONRenderer()
_USER_INFORMATION: Final = re.compile(r"(?<=://)[^\s/'\"\\]+(?=@)")


def redact_addresses(text: str) -> str:
    """`text` in which no address has a user and a password, as those of databases, brokers and proxies may."""
    return _USER_INFORMATION.sub("<secret>", text)


def _render(logger: WrappedLogger, name: str, line: EventDict) -> str:
    return redact_addresses(str(_JSON(logger, name, line)))


class LogThrottle:
    """Bounds the lines that one kind of event may log, for events that a stranger can cause as often as they like.

    Args:
        lines: how many lines of a kind are logged in each span; further ones are counted.
        seconds: the length of a span.
        clock: monotonic seconds.
    """

    def __init__(self, lines: int = 10, seconds: float = 60, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines = lines
        self._seconds = seconds
        self._clock = clock
        self._spans: dict[str, tuple[float, int]] = {}
        self._suppressed: dict[str, int] = {}

    def admit(self, kind: str) -> int | None:
        """How many events of this kind were left out since its last line; null where this one is to be left out too.

        Kinds are kept for ever, so there may be few of them.
        """
        now = self._clock()
        began, lines = self._spans.get(kind, (now, 0))
        if now - began >= self._seconds:
            began, lines = now, 0
        self._spans[kind] = (began, lines + 1)
        if lines >= self._lines:
            self._suppressed[kind] = self._suppressed.get(kind, 0) + 1
            return None
        return self._suppressed.pop(kind, 0)


def configure(level: int = logging.INFO) -> None:
    """Configure the logging of a process of the service."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "json": {
                    "()": structlog.stdlib.ProcessorFormatter,
                    "foreign_pre_chain": _SHARED,
                    "processors": [
                        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                        _render,
                    ],
                }
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"handlers": ["stderr"], "level": level},
        }
    )
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
