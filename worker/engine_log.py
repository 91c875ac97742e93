"""What the engine writes to its log, as it is passed on: line by line, without paths and secrets, in chunks."""

from collections.abc import Callable, Iterator
from typing import Final

from domain.jobs.engine_logs import MAX_CHUNK_BYTES, LogChunk
from worker.bounded_log import BoundedLog

MAX_READ_BYTES: Final = 256 * 1024
"""What is read at a time: of an engine that writes more, the oldest is left out, and a line says how much."""
_MAX_LINE_BYTES: Final = 16 * 1024


class EngineLogReader:
    """Reads a log as it grows.

    Args:
        redact: replaces what clients must not see; it is given whole lines, so that nothing is hidden by a cut.
    """

    def __init__(self, log: BoundedLog, redact: Callable[[bytes], bytes]) -> None:
        self._log = log
        self._redact = redact
        self._partial = b""
        """The beginning of a line whose end was not written yet."""
        self._offset = 0

    @property
    def has_more(self) -> bool:
        """Whether the log has grown since it was read."""
        return self._log.unread > 0

    def read(self, *, final: bool) -> list[LogChunk]:
        """The lines that were added.

        Args:
            final: whether no more follow, so that a line without an end counts too.
        """
        skipped, content = self._log.read_new(MAX_READ_BYTES)
        content = self._partial + content
        if skipped:
            # The line whose middle is missing is left out with it.
            content = b"\n[%d bytes of the log were not kept]\n" % skipped + content[len(self._partial) :]
        end = len(content) if final else max(content.rfind(b"\n"), content.rfind(b"\r")) + 1
        if len(content) - end > _MAX_LINE_BYTES:
            end = len(content)
        self._partial = content[end:]
        text = self._redact(content[:end]).decode("utf-8", "replace")
        return list(self._chunks(text.encode()))

    def _chunks(self, content: bytes) -> Iterator[LogChunk]:
        begin = 0
        while begin < len(content):
            end = min(begin + MAX_CHUNK_BYTES, len(content))
            # No character is cut: a byte of UTF-8 that continues one is 10xxxxxx.
            while end < len(content) and content[end] & 0xC0 == 0x80:
                end -= 1
            yield LogChunk(self._offset, content[begin:end])
            self._offset += end - begin
            begin = end
