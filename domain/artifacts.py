"""The artifact store: checkpoints and other finished files, each whole or absent.

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
from typing import Any

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

_STAGING = ".staging"
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,7}")


class ArtifactNotFound(Exception):
    """There is no such artifact, or it holds no such file."""


class ArtifactCorrupt(Exception):
    """Files are missing, of another size or of another content than the manifest says."""


class ArtifactExists(Exception):
    """Another artifact is stored under this key."""


class ArtifactStore:
    """Artifacts in one directory tree."""

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
        manifest = _read_manifests(source, nested=nested)
        with self._staging_directory() as staged:
            _transfer(source, staged, manifest, link=True)
            self._commit(staged, target, manifest)
        return manifest

    def publish_file(self, source: Path, key: str) -> ManifestFile:
        """Store a copy of one file, replacing an earlier one under the same key."""
        target = self._path_of(key)
        with self._staging_directory() as staged:
            copy = staged / target.name
            _copy(source, copy)
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
        return _read_manifests(directory)

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
            if not target.is_dir() or _read_manifests(target) != manifest:
                raise ArtifactExists("Another artifact is stored under this key.") from None
        flush_directory(target.parent)


def _is_older(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.stat().st_mtime >= seconds
    except FileNotFoundError:
        # Another process has just removed it.
        return False


def _read_manifests(directory: Path, *, nested: bool = True) -> Manifest:
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
            _link_or_copy(source / file.path, copy) if link else _copy(source / file.path, copy)
            whole = is_whole(copy, file)
            flush_file(copy)
        except FileNotFoundError:
            whole = False
        if not whole:
            raise ArtifactCorrupt(f"{file.path} is not what the manifest says.")
    for directory in directories:
        flush_directory(directory)


def _link_or_copy(source: Path, target: Path) -> None:
    with _open_regular(source):
        pass
    try:
        os.link(source, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:
        # The store is on another file system, or on one without links.
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    with _open_regular(source) as descriptor, os.fdopen(os.dup(descriptor), "rb") as read, target.open("xb") as write:
        shutil.copyfileobj(read, write, 2**20)


@contextmanager
def _open_regular(path: Path) -> Iterator[int]:
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
