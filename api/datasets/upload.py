"""An upload on its way in: the body goes to a file before any transaction begins, and nothing of a failure stays."""

import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, BinaryIO

from anyio import CancelScope
from anyio.to_thread import run_sync
from fastapi import Depends, Request

from api.auth import Caller
from api.datasets.multipart import MultipartFile
from api.idempotency.requests import HeldKey, fingerprint
from api.sessions import WriteSession
from domain.artifacts import ArtifactStore
from domain.errors import ApiError, BodyTooLarge, UnsupportedMediaType
from domain.settings import Settings
from pocl.errors import is_disk_full
from pocl.storage.manifest import ManifestFile, sha256_of

JSONL_TYPES = ("application/jsonl", "application/x-ndjson", "application/x-jsonlines")
MULTIPART = "multipart/form-data"
_WRITE_BYTES = 1 << 20
# Boundaries and part headers come on top of the file.
_MULTIPART_OVERHEAD = 1 << 16
_ABANDONED_SECONDS = 24 * 3600


class UploadTooLarge(BodyTooLarge):
    """The file is larger than the service accepts: split it, or raise POCL_MAX_UPLOAD_BYTES."""

    code = "upload_too_large"


class StorageFull(ApiError):
    """The service has no space left to store this: free some and send it again."""

    status = 507
    code = "storage_full"
    retryable = True


class Upload:
    """A body in a file of its own, and what was published from it."""

    def __init__(self, path: Path, store: ArtifactStore) -> None:
        self.path = path
        self.filename: str | None = None
        """As a multipart form names it."""
        self.fingerprint = ""
        """Of what was asked for under an `Idempotency-Key`."""
        self._store = store
        self._published: list[str] = []

    def publish(self, key: str) -> ManifestFile:
        """Store the file under `key`; it is removed again if the request fails.

        Raises:
            StorageFull: there is no space left; nothing is stored then.
        """
        self._published.append(key)
        with raising_storage_full():
            return self._store.publish_file(self.path, key)

    def remove_published(self) -> None:
        """Remove what was published."""
        for key in self._published:
            self._store.remove(key)


async def _receive_upload(request: Request, _caller: Caller, ticket: HeldKey) -> AsyncIterator[Upload]:
    settings: Settings = request.app.state.settings
    form = _form(request.headers.get("content-type", ""))
    upload = Upload(_new_file(spool_directory(settings)), request.app.state.store)
    try:
        with raising_storage_full(), upload.path.open("wb") as target:
            await _receive(request, form, target, settings.max_upload_bytes)
        upload.filename = form.filename if form is not None else None
        if ticket is not None:
            # Of the file and not of the body: a client that tries again sets another boundary.
            content = await run_sync(sha256_of, upload.path)
            upload.fingerprint = fingerprint(request, content.encode(), (upload.filename or "").encode())
            ticket.compare(upload.fingerprint)
        yield upload
    except BaseException:
        # A failing commit is seen here as well: the session, opened later, is closed before this.
        with CancelScope(shield=True):
            await run_sync(upload.remove_published)
        raise
    finally:
        upload.path.unlink(missing_ok=True)


ReceivedUpload = Annotated[Upload, Depends(_receive_upload, scope="function")]


def _once(request: Request, session: WriteSession, upload: ReceivedUpload, ticket: HeldKey) -> Iterator[None]:
    with ticket.kept(session, request, upload.fingerprint) if ticket is not None else nullcontext():
        yield


IdempotentUpload = Annotated[None, Depends(_once, scope="function")]
"""Makes a data set once for each `Idempotency-Key`."""


@contextmanager
def raising_storage_full() -> Iterator[None]:
    """
    Raises:
        StorageFull: where the block meets a full disk or quota.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise StorageFull from None
        raise


def spool_directory(settings: Settings) -> Path:
    return settings.home / "uploads"


def remove_stale_spool_files(settings: Settings) -> None:
    """Remove what a killed process left in the spool a day ago or more."""
    for left in spool_directory(settings).glob("*"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.unlink()


def _new_file(directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=directory)
    os.close(descriptor)
    return Path(name)


def _form(content_type: str) -> MultipartFile | None:
    kind = content_type.partition(";")[0].strip().lower()
    if kind == MULTIPART:
        return MultipartFile(content_type)
    if kind not in JSONL_TYPES:
        raise UnsupportedMediaType(f"Send the rows as {', '.join(JSONL_TYPES)}, or as a file in {MULTIPART}.")
    return None


async def _receive(request: Request, form: MultipartFile | None, target: BinaryIO, limit: int) -> None:
    _refuse_declared(request.headers.get("content-length", ""), limit + (_MULTIPART_OVERHEAD if form else 0))
    received = kept = 0
    waiting = bytearray()
    async for chunk in request.stream():
        piece = chunk if form is None else form.feed(chunk)
        received += len(chunk)
        kept += len(piece)
        if kept > limit or received > kept + _MULTIPART_OVERHEAD:
            raise UploadTooLarge
        waiting += piece
        if len(waiting) >= _WRITE_BYTES:
            await run_sync(target.write, bytes(waiting))
            waiting.clear()
    if form is not None:
        form.finish()
    await run_sync(target.write, bytes(waiting))
    await run_sync(target.flush)


def _refuse_declared(content_length: str, limit: int) -> None:
    # Told before the client has sent it all.
    if content_length.isdecimal() and int(content_length) > limit:
        raise UploadTooLarge
