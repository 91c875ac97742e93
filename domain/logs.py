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

MAX_LINE_LENGTH: Final = 16_384
_VALUE_LENGTHS: Final = (4000, 1000, 200, 30)
"""The lengths to which values are cut, one after the other, until the line is short enough."""
_MAX_ENTRIES: Final = 30
_KEPT_FIRST: Final = ("event", "level", "logger", "timestamp", "request_id", "job_id", "attempt")
_JSON: Final = structlog.processors.JSONRenderer()
_USER_INFORMATION: Final = re.compile(r"(?<=://)[^\s/'\"\\]+(?=@)")


def redact_addresses(text: str) -> str:
    """`text` in which no address has a user and a password, as those of databases, brokers and proxies may."""
    return _USER_INFORMATION.sub("<secret>", text)


def current_request_id() -> str | None:
    """The id of the request that is being served, as its log lines have it; null outside of one."""
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return request_id if isinstance(request_id, str) else None


def _render(logger: WrappedLogger, name: str, line: EventDict) -> str:
    """The line as JSON, at most :data:`MAX_LINE_LENGTH` characters long and still JSON: what collects lines cuts longer
    ones anywhere.
    """
    rendered = redact_addresses(str(_JSON(logger, name, line)))
    for length in _VALUE_LENGTHS:
        if len(rendered) <= MAX_LINE_LENGTH:
            break
        rendered = redact_addresses(str(_JSON(logger, name, _shorten(line, length))))
    return rendered


def _shorten(line: EventDict, length: int) -> EventDict:
    """The line with its first entries alone, and of each long value the beginning and the end."""
    kept = [(name, line[name]) for name in _KEPT_FIRST if name in line]
    kept += [(name, value) for name, value in line.items() if name not in _KEPT_FIRST]
    short = {str(name)[:length]: _shorten_value(value, length) for name, value in kept[:_MAX_ENTRIES]}
    return {**short, "shortened": True}


def _shorten_value(value: object, length: int) -> object:
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= length else f"{text[: length // 2]} [...] {text[-length // 2 :]}"


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
