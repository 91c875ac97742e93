"""Atomic directories and files: a manifest of sizes and SHA-256 digests, and a rename as the commit.

    with new_directory(target) as scratch:   # a temporary sibling
        ...write files below scratch...
    # here `target` exists, is complete, has manifest.json, and is on the disk

A process killed anywhere leaves either no `target` or a whole one. This module is free of torch: the service verifies
what it stores with the same code.
"""

import errno
import hashlib
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pocl.errors import CheckpointCorrupt, DiskFull, is_disk_full

MANIFEST = "manifest.json"
SCRATCH_PREFIX = ".tmp-"
_REPLACED_PREFIX = f"{SCRATCH_PREFIX}replaced-"
_MAX_MANIFEST_BYTES = 4 << 20


class ManifestFile(BaseModel):
    """One file of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: str = Field(
        pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$",
        max_length=1024,
        # To JSON Schema \w is ASCII alone.
        json_schema_extra={"pattern": r"^[^/.][^/]*(/[^/.][^/]*)*$"},
    )
    """The path relative to the manifest, with forward slashes; no part is hidden or leads upward."""
    size: int = Field(ge=0)
    """The size in bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """The SHA-256 digest of the content, hexadecimal."""


class WeightsFacts(BaseModel):
    """What a manifest says of the weights among its files; null where it says nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    requires: str | None = Field(default=None, max_length=64)
    """What reads the directory, as pip takes a requirement, e.g. `transformers>=4.57`."""
    dtype: str | None = Field(default=None, max_length=16)
    """The format of the stored weights: `float32`, `bfloat16` or `float16`."""
    tied_embeddings: bool | None = None
    """Whether input and output embeddings are one tensor."""


class Manifest(WeightsFacts):
    """Every file of a directory with its size and digest."""

    format: Literal[1] = 1
    """The version of the manifest's format."""
    files: tuple[ManifestFile, ...]
    """The files of the directory, by path."""

    @property
    def size_bytes(self) -> int:
        """The size of all files together."""
        return sum(file.size for file in self.files)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Make a directory atomically: give a scratch directory, write its manifest, flush it, rename it to `target`.

    A manifest that the block wrote or copied itself is kept.

    Raises:
        DiskFull: when there is no space; nothing named `target` exists then.
    """
    scratch = target.with_name(f"{SCRATCH_PREFIX}{target.name}-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with translating_disk_full():
            scratch.mkdir(parents=True)
            yield scratch
            seal_directory(scratch)
            replaced = target.with_name(f"{_REPLACED_PREFIX}{target.name}-{os.getpid()}")
            shutil.rmtree(replaced, ignore_errors=True)
            if target.exists():
                # Between the two renames a killed process leaves it there, from where `sweep` takes it back.
                target.rename(replaced)
            scratch.rename(target)
            flush_directory(target.parent)
            shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def seal_directory(directory: Path) -> None:
    """Write the manifest of a directory, unless it has one, and make all its files durable (fsync)."""
    if not (directory / MANIFEST).exists():
        write_manifest(directory)
    _flush_tree(directory)


def write_manifest(
    directory: Path, *, weights: WeightsFacts | None = None, known: Iterable[ManifestFile] = ()
) -> Manifest:
    """Write `manifest.json` for all files below `directory` but those of nested manifests.

    Args:
        weights: What is said of the weights among them.
        known: Entries of files that need not be digested again.
    """
    entries = {file.path: file for file in known}
    paths = {path.relative_to(directory).as_posix(): path for path in _own_files(directory)}
    files = tuple(entries.get(name) or describe(path, name) for name, path in paths.items())
    manifest = Manifest(files=files, **(weights or WeightsFacts()).model_dump(include=set(WeightsFacts.model_fields)))
    text = manifest.model_dump_json(indent=1, exclude_none=True)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        CheckpointCorrupt: when it is missing, too large or not a manifest.
    """
    path = directory / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise CheckpointCorrupt(f"the manifest of {directory.name} is too large")
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointCorrupt(f"{directory.name} has no readable manifest") from error


def verify(directory: Path) -> Manifest:
    """Check that every file of the manifest is there with its size and digest.

    Raises:
        CheckpointCorrupt: naming the first file that differs.
    """
    manifest = read_manifest(directory)
    for file in manifest.files:
        path = directory / file.path
        if path.is_symlink() or not path.is_file():
            raise CheckpointCorrupt(f"{directory.name} lacks {file.path}")
        if not _is_readable_and_whole(path, file):
            raise CheckpointCorrupt(f"{file.path} of {directory.name} is damaged")
    return manifest


def link_files(source: Path, target: Path, listed: Manifest, *, weights: WeightsFacts | None = None) -> None:
    """Give `target` those files of `listed` that it lacks, from `source`, and a manifest of them all.

    They are hard links where the file system has them.

    Args:
        weights: What is said of the weights of `target`; what `listed` says unless given.
    """
    linked = [file for file in listed.files if not (target / file.path).exists()]
    for file in linked:
        (target / file.path).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(source / file.path, target / file.path)
    # The same files need not be digested again.
    write_manifest(target, weights=weights or listed, known=linked)


def discard(directory: Path) -> None:
    """Remove a directory atomically: a crash leaves no half of it under its name."""
    doomed = directory.with_name(f"{SCRATCH_PREFIX}gone-{directory.name}-{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what killed processes left half-written or half-removed below `root`.

    A directory that was about to be replaced, and was not, gets its name back.
    """
    for replaced in list(root.rglob(f"{_REPLACED_PREFIX}*")):
        target = replaced.with_name(replaced.name.removeprefix(_REPLACED_PREFIX).rpartition("-")[0])
        if replaced.is_dir() and not target.exists():
            replaced.rename(target)
    for left in list(root.rglob(f"{SCRATCH_PREFIX}*")):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a small file atomically: it has either its old content or its new one.

    Raises:
        DiskFull: when there is no space; the old content stays.
    """
    scratch = path.with_name(f"{SCRATCH_PREFIX}{path.name}-{os.getpid()}")
    try:
        with translating_disk_full():
            scratch.write_text(text, encoding="utf-8")
            flush_file(scratch)
            scratch.replace(path)
            flush_directory(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def describe(location: Path, path: str) -> ManifestFile:
    """The entry of a manifest for the file at `location`, under the name `path`."""
    return ManifestFile(path=path, size=location.stat().st_size, sha256=sha256_of(location))


def is_whole(location: Path, file: ManifestFile) -> bool:
    """Whether the file at `location` has the size and the digest of its entry."""
    return location.stat().st_size == file.size and sha256_of(location) == file.sha256


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def write_all(out: io.FileIO, content: bytes) -> None:
    """Write all of `content` to an unbuffered file, whose single writes may be short on a nearly full disk."""
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[out.write(remaining) :]


def flush_file(path: Path) -> None:
    """Make the content of a written file durable (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_directory(directory: Path) -> None:
    """Make a rename in a directory durable (fsync)."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _is_readable_and_whole(path: Path, file: ManifestFile) -> bool:
    try:
        return is_whole(path, file)
    except OSError as error:
        # EIO is a bad sector. Any other error may be transient, and says nothing about the file.
        if error.errno == errno.EIO:
            return False
        raise


@contextmanager
def translating_disk_full() -> Iterator[None]:
    """Translate whatever a library raises on a full disk to DiskFull."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise DiskFull from error
        raise


def _own_files(directory: Path) -> list[Path]:
    nested = [path.parent for path in directory.glob(f"*/**/{MANIFEST}")]
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and path != directory / MANIFEST and not any(path.is_relative_to(own) for own in nested)
    )


def _flush_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_dir():
            flush_directory(path)
        else:
            flush_file(path)
    flush_directory(directory)
