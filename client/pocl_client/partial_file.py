"""A file that is being downloaded, beside its final name, and that a later download goes on with."""

import hashlib
import os
import threading
from pathlib import Path

from pocl_client.byte_ranges import PART_BYTES, ByteRange, split_ranges
from pocl_client.errors import DownloadDamaged

_READ_BYTES = 1 << 20
_LINE = "{:010d}\n"
_LINE_BYTES = 11


class PartialFile:
    """The bytes of a file that have arrived, and a journal of the parts that are whole.

    Both have hidden names beside the target, with the digest in them, so that parts of two versions of a file never
    meet. The target appears under its name by one rename, once its digest is that which was promised.

    Args:
        target: the final name.
        size: of the whole file, in bytes.
        sha256: its digest, hexadecimal.
    """

    def __init__(self, target: Path, size: int, sha256: str, *, part_bytes: int = PART_BYTES) -> None:
        self.target = target
        self.size = size
        self._sha256 = sha256
        self._parts = list(split_ranges(size, part_bytes))
        stem = f".{target.name}.{sha256[:16]}-{part_bytes}"
        self._content = target.with_name(f"{stem}.partial")
        self._journal = target.with_name(f"{stem}.journal")
        self._lock = threading.Lock()
        self._arrived: set[int] = set()

    def open(self) -> None:
        """Make the files, or read what an earlier download has left.

        Raises:
            OSError: they cannot be written.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if self._content.exists() and self._content.stat().st_size == self.size and self._journal.exists():
            text = self._journal.read_text(encoding="ascii", errors="replace")
            # A killed download may have left a part of a line.
            lines = [text[at : at + _LINE_BYTES] for at in range(0, len(text) - _LINE_BYTES + 1, _LINE_BYTES)]
            self._arrived = {int(line) for line in lines if line[:-1].isdigit() and int(line) < len(self._parts)}
            # What follows the last whole line would shift all lines behind it.
            os.truncate(self._journal, len(lines) * _LINE_BYTES)
        else:
            self._start_over()

    def missing(self) -> list[ByteRange]:
        """The parts that have not arrived."""
        with self._lock:
            return [part for index, part in enumerate(self._parts) if index not in self._arrived]

    def write(self, offset: int, content: bytes) -> None:
        """Put bytes in their place."""
        with self._content.open("r+b") as file:
            file.seek(offset)
            file.write(content)

    def finish_part(self, part: ByteRange) -> bool:
        """Note that a part is whole; whether the file is."""
        index = self._parts.index(part)
        with self._lock:
            self._arrived.add(index)
            with self._journal.open("a", encoding="ascii") as journal:
                journal.write(_LINE.format(index))
            return len(self._arrived) == len(self._parts)

    def publish(self) -> None:
        """Check the digest, and give the file its name.

        Raises:
            DownloadDamaged: the digest is another; nothing is left, so that the next download starts anew.
        """
        if sha256_of(self._content) != self._sha256:
            self.discard()
            raise DownloadDamaged(f"{self.target.name} arrived damaged: its SHA-256 is not that of the service.")
        os.replace(self._content, self.target)
        self._journal.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what has arrived."""
        self._journal.unlink(missing_ok=True)
        self._content.unlink(missing_ok=True)

    def _start_over(self) -> None:
        self._arrived = set()
        self._journal.write_bytes(b"")
        with self._content.open("wb") as file:
            file.truncate(self.size)


def sha256_of(path: Path) -> str:
    """The SHA-256 digest of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
