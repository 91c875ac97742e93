"""A stored directory as one tar stream: its length is known beforehand, and any range of it is read by itself.

The stream holds a header, the bytes and the padding of each file, as POSIX.1-2001 (pax) has it. It depends on the
manifest alone, so that two requests get the same bytes, and a broken download goes on where it ended.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Self

from domain.artifacts import ArtifactStore
from pocl.storage.manifest import Manifest, ManifestFile

_BLOCK: Final = tarfile.BLOCKSIZE
_END: Final = bytes(2 * _BLOCK)
"""Two empty blocks end a tar file."""


@dataclass(frozen=True)
class TarArchive:
    """The layout of an archive: which bytes come from where."""

    parts: tuple[bytes | ManifestFile, ...]
    """What is sent in this order: bytes as they are, or the content of a file."""
    digest: str
    """The SHA-256, hexadecimal, of the bytes between the files and of the files' digests: equal for equal archives."""

    @classmethod
    def create(cls, manifest: Manifest, *, folder: str, modified_at: datetime) -> Self:
        """The archive of the files of a manifest.

        Args:
            folder: the one directory that it unpacks to.
            modified_at: when its files were last changed.
        """
        parts: list[bytes | ManifestFile] = []
        digest = hashlib.sha256()
        for file in manifest.files:
            header = tarfile.TarInfo(f"{folder}/{file.path}")
            header.size, header.mtime = file.size, int(modified_at.timestamp())
            # Nobody's: the archive says nothing of the accounts of the service.
            head = header.tobuf(tarfile.PAX_FORMAT)
            padding = bytes(-file.size % _BLOCK)
            parts += [head, file, padding]
            digest.update(head + bytes.fromhex(file.sha256))
        return cls((*(part for part in parts if part != b""), _END), digest.hexdigest())

    @property
    def size_bytes(self) -> int:
        """The length of the stream."""
        return sum(_length(part) for part in self.parts)

    def read(self, store: ArtifactStore, key: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` up to `stop`, in pieces of bounded size.

        Args:
            key: of the directory that the manifest describes.
        """
        begin = 0
        for part in self.parts:
            length = _length(part)
            first, last = max(start - begin, 0), min(stop - begin, length)
            begin += length
            if first >= last:
                continue
            if isinstance(part, bytes):
                yield part[first:last]
            else:
                yield from store.read(key, part.path, first, last)


def _length(part: bytes | ManifestFile) -> int:
    return len(part) if isinstance(part, bytes) else part.size
