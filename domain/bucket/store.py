"""The artifact store in a bucket of an object store that speaks S3, through `obstore`.

Objects below the prefix of the bucket:

    KEY/PATH             the files of a directory, each with its digest in the metadata of the object
    KEY/.complete.json   the manifest of them all, written last: without it the directory is not there
    KEY                  a single file, with its digest in the metadata

What a killed process leaves is never served: files whose manifest was not written, which garbage collection finds under
their key, and parts of a file, which it finds among the multipart uploads of the bucket.

A process that has used a store must not fork: the client of the store runs in threads of its own.
"""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import structlog
from pydantic import ValidationError

from domain.artifacts import (
    ArtifactCorrupt,
    ArtifactExists,
    ArtifactNotFound,
    ArtifactStore,
    ArtifactStoreRefused,
    copy_file,
    media_type_of,
    open_regular,
    read_manifests,
)
from domain.bucket.abandoned_uploads import abort_uploads
from domain.bucket.copies import LocalCopies
from domain.bucket.faults import translating_store_errors
from domain.bucket.location import MAX_RETRIES, Bucket
from domain.settings import Settings
from pocl.storage.manifest import Manifest, ManifestFile, describe, flush_file

if TYPE_CHECKING:
    from obstore.store import S3Store

_log = structlog.get_logger(__name__)

_COMPLETE: Final = ".complete.json"
_DIGEST: Final = "sha256"
_PART_BYTES: Final = 16 * 2**20
_READ_BYTES: Final = 4 * 2**20
_MAX_PARTS: Final = 9000
"""S3 takes 10,000 parts of a file."""
_PARTS_AT_ONCE: Final = 4


class BucketArtifactStore(ArtifactStore):
    """Artifacts in a bucket. Of single files copies are kept in a directory of this machine, for a while."""

    is_remote = True

    def __init__(
        self,
        root: Path,
        bucket: Bucket,
        *,
        link_endpoint: str | None = None,
        link_seconds: int = 900,
        max_copied_bytes: int = 2**34,
        max_retries: int = MAX_RETRIES,
        part_bytes: int = _PART_BYTES,
    ) -> None:
        """Args:
        root: of the copies.
        link_endpoint: the address under which clients reach the store; the bucket's unless given.
        link_seconds: how long a presigned address is good.
        max_copied_bytes: the size of the copies, whose least recently used are removed first.
        """
        super().__init__(root)
        self._bucket = bucket
        self._link_endpoint = link_endpoint
        self._link_seconds = link_seconds
        self._copies = LocalCopies(root, max_copied_bytes)
        self._max_retries = max_retries
        self._part_bytes = part_bytes

    @classmethod
    def from_settings(cls, settings: Settings) -> "BucketArtifactStore":
        """The store that the settings name, which is `s3://...`."""
        assert settings.artifact_store is not None
        return cls(
            settings.artifact_root,
            Bucket.parse(settings.artifact_store),
            link_endpoint=settings.artifact_public_endpoint,
            link_seconds=settings.artifact_link_seconds,
            max_copied_bytes=settings.max_artifact_copies_bytes,
        )

    # --- Storing ----------------------------------------------------------------------------------------

    def publish(self, source: Path, key: str, *, nested: bool = True) -> Manifest:
        self._path_of(key)
        manifest = read_manifests(source, nested=nested)
        if (stored := self._find_manifest(key)) is not None:
            if stored != manifest:
                raise ArtifactExists("Another artifact is stored under this key.")
            return manifest
        for file in manifest.files:
            self._upload(source / file.path, f"{key}/{file.path}", file)
        content = manifest.model_dump_json().encode()
        self._put(f"{key}/{_COMPLETE}", content, _attributes(_COMPLETE, hashlib.sha256(content).hexdigest()))
        return manifest

    def publish_file(self, source: Path, key: str, *, link: bool = False, keep: bool = False) -> ManifestFile:
        target = self._path_of(key)
        with self._staging_directory() as staged:
            # The engine may add to the file, or remove it, while it is uploaded.
            copy_file(source, staged / target.name, link=link)
            stored = describe(staged / target.name, target.name)
            self._upload(staged / target.name, key, stored)
            if keep:
                self._copies.add(staged / target.name, target)
        return stored

    def remove(self, key: str) -> None:
        super().remove(key)
        with translating_store_errors():
            import obstore

            names = [each["path"] for page in obstore.list(self._remote, key) for each in page]
            # Without its manifest nothing of a directory is served any more.
            names.sort(key=lambda name: not name.endswith(f"/{_COMPLETE}"))
            for name in names[: sum(each.endswith(f"/{_COMPLETE}") for each in names)]:
                obstore.delete(self._remote, name)
            obstore.delete(self._remote, [*names, key])

    def remove_stale(self, older_than: float) -> int:
        removed = super().remove_stale(older_than)
        self._copies.trim()
        return removed + abort_uploads(self._bucket, older_than)

    # --- Reading ----------------------------------------------------------------------------------------

    def manifest(self, key: str) -> Manifest:
        self._path_of(key)
        manifest = self._find_manifest(key)
        if manifest is None:
            raise ArtifactNotFound("There is no such artifact.")
        return manifest

    def locate(self, key: str, path: str | None = None) -> Path:
        if path is not None:
            raise ArtifactNotFound("The files of a directory are not on this machine.")
        copy = self._path_of(key)
        if not self._copies.use(copy):
            with self._staging_directory() as staged:
                self._download(key, staged / copy.name, None)
                self._copies.add(staged / copy.name, copy)
        return super().locate(key)

    def read(self, key: str, path: str | None, start: int, stop: int) -> Iterator[bytes]:
        name = self._name_of(key, path)
        with translating_store_errors():
            import obstore

            while start < stop:
                end = min(start + _READ_BYTES, stop)
                piece = obstore.get_range(self._remote, name, start=start, end=end)
                if len(piece) != end - start:
                    raise ArtifactCorrupt(f"{name} is shorter than the manifest says.")
                yield bytes(piece)
                start = end

    def fetch_file(self, key: str, destination: Path) -> None:
        staged = destination.with_name(f".{destination.name}-{uuid.uuid4().hex}")
        try:
            self._download(self._name_of(key, None), staged, None)
            staged.replace(destination)
        finally:
            staged.unlink(missing_ok=True)

    def provide_file(self, key: str, scratch: Path) -> Path:
        scratch.mkdir(parents=True, exist_ok=True)
        path = scratch / key.replace("/", "_")
        if not path.exists():
            self.fetch_file(key, path)
        return path

    def provide_directory(self, key: str, scratch: Path) -> Path:
        path = scratch / key.replace("/", "_")
        if not path.exists():
            self.checkout(key, path)
        return path

    def checkout(self, key: str, destination: Path, *, link: bool = True) -> Manifest:  # noqa: ARG002 - nothing to link
        if destination.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(destination))
        manifest = self.manifest(key)
        destination.parent.mkdir(parents=True, exist_ok=True)
        staged = destination.with_name(f".{destination.name}-{uuid.uuid4().hex}")
        try:
            for file in manifest.files:
                (staged / file.path).parent.mkdir(parents=True, exist_ok=True)
                self._download(f"{key}/{file.path}", staged / file.path, file)
            os.rename(staged, destination)
        except ArtifactNotFound:
            raise ArtifactCorrupt("A file of the artifact is missing.") from None
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return manifest

    def list_keys(self, prefix: str, *, older_than: float = 0.0) -> list[str]:
        self._path_of(prefix)
        with translating_store_errors():
            import obstore

            listed = obstore.list_with_delimiter(self._remote, prefix)
            keys = [each["path"] for each in listed["objects"] if _is_older(each["last_modified"], older_than)]
            for folder in listed["common_prefixes"]:
                if older_than <= 0 or self._is_folder_older(folder, older_than):
                    keys.append(folder)
        return sorted(key for key in keys if not key.endswith(f"/{_COMPLETE}"))

    def address(self, key: str, path: str | None, method: Literal["GET", "HEAD"]) -> str:
        with translating_store_errors():
            import obstore

            expiry = timedelta(seconds=self._link_seconds)
            return obstore.sign(self._public, method, self._name_of(key, path), expiry)

    def find_fault(self) -> str | None:
        probe = f".probe/{uuid.uuid4().hex}"
        try:
            with translating_store_errors():
                import obstore

                obstore.list_with_delimiter(self._remote, "jobs/none")
            self._put(probe, b"probe", {})
            with translating_store_errors():
                obstore.delete(self._remote, probe)
        except ArtifactStoreRefused as error:
            return str(error)
        return None

    # --- The client of the bucket -----------------------------------------------------------------------

    @cached_property
    def _remote(self) -> "S3Store":
        return self._bucket.connect(max_retries=self._max_retries)

    @cached_property
    def _public(self) -> "S3Store":
        """The store as clients reach it; nothing but addresses is made with it."""
        return self._bucket.connect(self._link_endpoint)

    def _name_of(self, key: str, path: str | None) -> str:
        self._path_of(key)
        return key if path is None else f"{key}/{path}"

    def _find_manifest(self, key: str) -> Manifest | None:
        try:
            with translating_store_errors():
                import obstore

                content = bytes(obstore.get(self._remote, f"{key}/{_COMPLETE}").bytes())
        except ArtifactNotFound:
            return None
        try:
            return Manifest.model_validate_json(content)
        except ValidationError:
            raise ArtifactCorrupt("The manifest of the artifact cannot be read.") from None

    def _put(self, name: str, content: bytes, attributes: dict[str, str]) -> None:
        with translating_store_errors():
            import obstore

            obstore.put(self._remote, name, content, attributes=attributes, use_multipart=False)

    def _upload(self, source: Path, name: str, file: ManifestFile) -> None:
        """Store one file, unless it is there already. Each request is signed with the digest of its bytes, which the
        store compares; the digest of all of them is compared here before the last part is complete.

        Raises:
            ArtifactCorrupt: the file is missing, or is not as `file` says.
        """
        if self._is_stored(name, file):
            return
        attributes = _attributes(name, file.sha256)
        try:
            if file.size <= self._part_bytes:
                self._put(name, b"".join(_verified_pieces(source, file, self._part_bytes)), attributes)
                return
            with translating_store_errors():
                import obstore

                obstore.put(
                    self._remote,
                    name,
                    _verified_pieces(source, file, self._part_bytes),
                    attributes=attributes,
                    use_multipart=True,
                    chunk_size=max(self._part_bytes, file.size // _MAX_PARTS + 1),
                    max_concurrency=_PARTS_AT_ONCE,
                )
        except FileNotFoundError:
            raise ArtifactCorrupt(f"{file.path} is not what the manifest says.") from None

    def _is_stored(self, name: str, file: ManifestFile) -> bool:
        try:
            with translating_store_errors():
                import obstore

                found = obstore.get(self._remote, name, options={"head": True})
        except ArtifactNotFound:
            return False
        return found.meta["size"] == file.size and found.attributes.get(_DIGEST) == file.sha256

    def _download(self, name: str, target: Path, file: ManifestFile | None) -> None:
        """Write the content of an object to `target`, and compare it with its digest.

        Args:
            file: what it should be; as the metadata of the object say unless given.

        Raises:
            ArtifactNotFound: there is no such object.
            ArtifactCorrupt: it is not what it should be.
        """
        digest, size = hashlib.sha256(), 0
        with translating_store_errors():
            import obstore

            found = obstore.get(self._remote, name)
            with target.open("xb") as write:
                for piece in found.stream(min_chunk_size=2**20):
                    digest.update(piece)
                    size += len(piece)
                    write.write(piece)
        expected = (found.meta["size"], found.attributes.get(_DIGEST)) if file is None else (file.size, file.sha256)
        if (size, digest.hexdigest()) != expected:
            raise ArtifactCorrupt(f"{name} is not what was stored.")
        flush_file(target)

    def _is_folder_older(self, folder: str, seconds: float) -> bool:
        import obstore

        times = [each["last_modified"] for page in obstore.list(self._remote, folder) for each in page]
        return all(_is_older(each, seconds) for each in times)


def _attributes(name: str, sha256: str) -> dict[str, str]:
    filename = name.rpartition("/")[2]
    attributes = {"Content-Type": media_type_of(filename), _DIGEST: sha256}
    if filename.isascii() and '"' not in filename:
        attributes["Content-Disposition"] = f'attachment; filename="{filename}"'
    return attributes


def _verified_pieces(source: Path, file: ManifestFile, size: int) -> Iterator[bytes]:
    """The bytes of a file; an error at their end where they are not those of `file`, before the store has them all."""
    digest = hashlib.sha256()
    with open_regular(source) as descriptor, os.fdopen(os.dup(descriptor), "rb") as read:
        while piece := read.read(size):
            digest.update(piece)
            yield piece
    if digest.hexdigest() != file.sha256:
        raise ArtifactCorrupt(f"{file.path} is not what the manifest says.")


def _is_older(moment: datetime, seconds: float) -> bool:
    return (datetime.now(UTC) - moment).total_seconds() >= seconds
