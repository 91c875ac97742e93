"""The artifact store: checkpoints and other finished files, each whole or absent; here in a directory.

An artifact is a directory or a single file under a key such as `jobs/job_x/checkpoints/step-000100`. A directory
carries `manifest.json`, which names its files with size and SHA-256; a folder in it may have a manifest of its own.
Only files that a manifest names are stored and served. Publishing is atomic: files are linked or copied into a staging
directory, synced, and renamed; a process that is killed at any point leaves the store as it was.
"""

import errno
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import structlog

from pocl.errors import CheckpointCorrupt
from pocl.storage.manifest import (
    MANIFEST,
    Manifest,
    ManifestFile,
    WeightsFacts,
    describe,
    flush_directory,
    flush_file,
    is_whole,
    read_manifest,
)

_log = structlog.get_logger(__name__)

_MEDIA_TYPES: Final = {
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".html": "text/html; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
_DEFAULT_MEDIA_TYPE: Final = "application/octet-stream"
MEDIA_TYPES: Final = frozenset({*_MEDIA_TYPES.values(), _DEFAULT_MEDIA_TYPE})
"""The media types of stored files."""
_STAGING = ".staging"
_PIECE_BYTES = 2**20
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,7}")


class ArtifactNotFound(Exception):
    """There is no such artifact, or it holds no such file."""


class ArtifactCorrupt(Exception):
    """Files are missing, of another size or of another content than the manifest says."""


class ArtifactExists(Exception):
    """Another artifact is stored under this key."""


class ArtifactStoreUnavailable(OSError):
    """The store is away: another time the same may succeed."""

    def __str__(self) -> str:
        return "The artifact store does not answer: check AWS_ENDPOINT_URL and the network."


class ArtifactStoreRefused(OSError):
    """The store is full, forbidden, or not there: an operator must look at it. `errno` says which."""

    def __str__(self) -> str:
        return str(self.strerror)


def media_type_of(name: str) -> str:
    """The media type of a stored file, by its name."""
    return _MEDIA_TYPES.get(PurePosixPath(name).suffix, _DEFAULT_MEDIA_TYPE)


class ArtifactStore:
    """Artifacts in one directory tree of this machine."""

    is_remote = False
    """Whether the artifacts are elsewhere, and clients may be sent there."""

    def __init__(self, root: Path) -> None:
        self._root = root
        (root / _STAGING).mkdir(parents=True, exist_ok=True)

    def publish(self, source: Path, key: str, *, nested: bool = True) -> Manifest:
        """Store the directory `source`: hard links where the file system allows it, else copies.

        Publishing the same content again changes nothing. The files of `source` must not change afterwards.

        Args:
            nested: store the folders too that have a manifest of their own.

        Returns:
            all stored files, the manifests themselves included.

        Raises:
            ArtifactCorrupt: `source` is not what its manifest says.
            ArtifactExists: the key holds other content.
            OSError: the disk is full or fails; the store is as it was.
        """
        target = self._path_of(key)
        manifest = read_manifests(source, nested=nested)
        with self._staging_directory() as staged:
            _transfer(source, staged, manifest, link=True)
            self._commit(staged, target, manifest)
        return manifest

    def publish_file(self, source: Path, key: str, *, link: bool = False, keep: bool = False) -> ManifestFile:
        """Store a copy of one file, replacing an earlier one under the same key.

        Args:
            link: share the file with the caller, where the file system allows it, who must then never change it.
            keep: keep a copy on this machine where the store is elsewhere: it is soon read here.
        """
        del keep  # It is here.
        target = self._path_of(key)
        with self._staging_directory() as staged:
            copy = staged / target.name
            copy_file(source, copy, link=link)
            stored = describe(copy, target.name)
            flush_file(copy)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(copy, target)
            flush_directory(target.parent)
        return stored

    def manifest(self, key: str) -> Manifest:
        """The combined manifest of a stored directory: all its files, manifests included.

        Raises:
            ArtifactNotFound: nothing is stored under this key.
            ArtifactCorrupt: its manifest cannot be read.
        """
        directory = self._path_of(key)
        if not directory.is_dir():
            raise ArtifactNotFound("There is no such artifact.")
        return read_manifests(directory)

    def locate(self, key: str, path: str | None = None) -> Path:
        """The path of a stored file, for reading: of `path` in a directory, or of the file `key` itself.

        Raises:
            ArtifactNotFound: there is no such artifact, or its manifest names no such file.
        """
        if path is None:
            file = self._path_of(key)
        else:
            if path not in {entry.path for entry in self.manifest(key).files}:
                raise ArtifactNotFound("The artifact holds no such file.")
            file = self._path_of(key) / path
        # A link could lead anywhere. Publishing makes none, so a link in the store was put there by somebody else.
        if not file.is_file() or file.resolve() != self._root.resolve() / file.relative_to(self._root):
            raise ArtifactNotFound("There is no such file.")
        return file

    def read(self, key: str, path: str | None, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of a stored file from `start` up to `stop`, in pieces of bounded size: of `path` in a directory, or
        of the file `key` itself.

        Raises:
            ArtifactNotFound: there is no such file.
            ArtifactCorrupt: it ends before `stop`.
        """
        with self.locate(key, path).open("rb") as file:
            file.seek(start)
            while start < stop:
                piece = file.read(min(_PIECE_BYTES, stop - start))
                if not piece:
                    raise ArtifactCorrupt(f"{path or key} is shorter than the manifest says.")
                start += len(piece)
                yield piece

    def directory(self, key: str) -> Path:
        """The path of a stored directory, for reading.

        Raises:
            ArtifactNotFound: nothing is stored under this key.
            ArtifactCorrupt: its manifest cannot be read.
        """
        self.manifest(key)
        return self._path_of(key).absolute()

    def checkout(self, key: str, destination: Path, *, link: bool = True) -> Manifest:
        """Make `destination` a verified copy of a stored directory; it appears whole or not at all.

        Args:
            link: share the files with the store. The caller must then never change them in place.

        Raises:
            ArtifactNotFound, ArtifactCorrupt: nothing whole is stored under this key.
            FileExistsError: `destination` exists.
        """
        if destination.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(destination))
        manifest = self.manifest(key)
        destination.parent.mkdir(parents=True, exist_ok=True)
        staged = destination.with_name(f".{destination.name}-{uuid.uuid4().hex}")
        try:
            staged.mkdir()
            _transfer(self._path_of(key), staged, manifest, link=link)
            os.rename(staged, destination)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return manifest

    def fetch_file(self, key: str, destination: Path) -> None:
        """Make `destination` a copy of a stored file.

        Raises:
            ArtifactNotFound: nothing is stored under this key.
            ArtifactCorrupt: it is not what was stored, as far as the store knows.
        """
        shutil.copyfile(self.locate(key), destination)

    def provide_file(self, key: str, scratch: Path) -> Path:
        """The path of a stored file for reading, fetched to below `scratch` where the store is elsewhere.

        Raises:
            ArtifactNotFound, ArtifactCorrupt: nothing whole is stored under this key.
        """
        del scratch
        return self.locate(key)

    def provide_directory(self, key: str, scratch: Path) -> Path:
        """The path of a stored directory for reading, fetched to below `scratch` where the store is elsewhere.

        Raises:
            ArtifactNotFound, ArtifactCorrupt: nothing whole is stored under this key.
        """
        del scratch
        return self.directory(key)

    def address(self, key: str, path: str | None, method: Literal["GET", "HEAD"]) -> str | None:
        """The presigned address at which a client gets a stored file for a while; null where there is none.

        Args:
            path: of a file in the directory `key`; null for the file `key` itself.
            method: the one that the address is good for.
        """
        del key, path, method
        return None

    def find_fault(self) -> str | None:
        """Why nothing can be stored, in one sentence; null where something can. A directory is checked by its worker.

        Raises:
            ArtifactStoreUnavailable: the store is away.
        """
        return None

    def discard(self, key: str) -> None:
        """Remove an artifact that no row names any more; what cannot be removed now is left to garbage collection."""
        try:
            self.remove(key)
        except OSError as error:
            _log.warning("artifact_not_removed", key=key, error=str(error))

    def remove(self, key: str) -> None:
        """Remove an artifact atomically; one that is gone already is no error."""
        with self._staging_directory() as staged:
            try:
                os.rename(self._path_of(key), staged / "removed")
            except FileNotFoundError:
                return

    def list_keys(self, prefix: str, *, older_than: float = 0.0) -> list[str]:
        """The keys of the artifacts directly under `prefix` that are older than so many seconds, sorted."""
        directory = self._path_of(prefix)
        entries = directory.iterdir() if directory.is_dir() else ()
        return sorted(f"{prefix}/{entry.name}" for entry in entries if _is_older(entry, older_than))

    def remove_stale(self, older_than: float) -> int:
        """Remove staging directories that killed processes left more than `older_than` seconds ago.

        Returns:
            how many were removed.
        """
        removed = 0
        for directory in (self._root / _STAGING).iterdir():
            if _is_older(directory, older_than):
                shutil.rmtree(directory, ignore_errors=True)
                removed += 1
        return removed

    def _path_of(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ArtifactNotFound("The key of an artifact is made of plain names.")
        return self._root / key

    @contextmanager
    def _staging_directory(self) -> Iterator[Path]:
        # It lies inside the root, so that the rename stays on one file system.
        staged = self._root / _STAGING / uuid.uuid4().hex
        staged.mkdir()
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _commit(self, staged: Path, target: Path, manifest: Manifest) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(staged, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if not target.is_dir() or read_manifests(target) != manifest:
                raise ArtifactExists("Another artifact is stored under this key.") from None
        flush_directory(target.parent)


def _is_older(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime >= seconds
    except FileNotFoundError:
        # Another process has just removed it.
        return False


def read_manifests(directory: Path, *, nested: bool = True) -> Manifest:
    """The manifest of a directory with, where `nested`, those of its folders, and the manifests themselves.

    Raises:
        ArtifactCorrupt: a manifest cannot be read, or names a path that is not in its plain form.
    """
    folders = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False))
    with_manifest = [folder for folder in folders if nested and (directory / folder / MANIFEST).exists()]
    files: dict[str, ManifestFile] = {}
    weights: dict[str, Any] = {}
    for folder in ("", *with_manifest):
        try:
            read = read_manifest(directory / folder)
            listed = read.files
            # The directory says it of its weights; its folders have none.
            weights = weights or read.model_dump(include=set(WeightsFacts.model_fields))
            manifest = describe(directory / folder / MANIFEST, MANIFEST)
        except (OSError, CheckpointCorrupt):
            raise ArtifactCorrupt(f"The manifest of {folder or 'the directory'} cannot be read.") from None
        for file in (*listed, manifest):
            path = PurePosixPath(folder, file.path)
            if str(PurePosixPath(file.path)) != file.path:
                raise ArtifactCorrupt("The manifest names a path that is not in its plain form.")
            files[str(path)] = file.model_copy(update={"path": str(path)})
    return Manifest(files=tuple(files[path] for path in sorted(files)), **weights)


def _transfer(source: Path, target: Path, manifest: Manifest, *, link: bool) -> None:
    """Link or copy the files of the manifest, verify size and digest of each, and sync them to the disk.

    Raises:
        ArtifactCorrupt: a file is missing or is not what the manifest says.
    """
    directories = {target}
    for file in manifest.files:
        copy = target / file.path
        copy.parent.mkdir(parents=True, exist_ok=True)
        directories.update(parent for parent in copy.parents if parent.is_relative_to(target))
        try:
            copy_file(source / file.path, copy, link=link)
            whole = is_whole(copy, file)
            flush_file(copy)
        except FileNotFoundError:
            whole = False
        if not whole:
            raise ArtifactCorrupt(f"{file.path} is not what the manifest says.")
    for directory in directories:
        flush_directory(directory)


def copy_file(source: Path, target: Path, *, link: bool = False) -> None:
    """Make `target` a copy of a regular file, or a hard link to it where that is asked for and possible.

    Raises:
        FileNotFoundError: there is no regular file at `source`.
    """
    _link_or_copy(source, target) if link else _copy(source, target)


def _link_or_copy(source: Path, target: Path) -> None:
    with open_regular(source):
        pass
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        # The store is on another file system, or on one without links.
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    with open_regular(source) as descriptor, os.fdopen(os.dup(descriptor), "rb") as read, target.open("xb") as write:
        shutil.copyfileobj(read, write, 2**20)


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A descriptor for reading; anything but a regular file (a link, a pipe) counts as missing."""
    try:
        # O_NONBLOCK: to open a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path)) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path))
        yield descriptor
    finally:
        os.close(descriptor)
