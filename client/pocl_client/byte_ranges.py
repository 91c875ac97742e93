"""Parts of files: how a download is divided."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

PART_BYTES: Final = 16 * 2**20
"""The size of a part: what an interrupted download gets again of each of its connections at most."""


@dataclass(frozen=True)
class ByteRange:
    """The bytes from `start` up to `stop`, exclusive."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def split_ranges(size: int, part_bytes: int = PART_BYTES) -> Iterator[ByteRange]:
    """The parts of a file of `size` bytes, in order; none of an empty one."""
    for start in range(0, size, part_bytes):
        yield ByteRange(start, min(start + part_bytes, size))


def first_byte(content_range: str) -> int | None:
    """The first byte that `Content-Range: bytes 16-31/64` names; null where it is no such range."""
    unit, _, rest = content_range.partition(" ")
    first = rest.partition("-")[0]
    return int(first) if unit == "bytes" and first.isascii() and first.isdigit() else None
