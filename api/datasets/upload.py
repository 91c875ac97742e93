"""Receiving an upload: the body is spooled to a file before any transaction begins, and a failed request leaves
nothing behind.
"""

import json
import os
import shutil
import tempfile
import time
from asyncio import create_task, wait
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import structlog
from anyio import CancelScope
from anyio.to_thread import run_sync
from fastapi import Depends, Query, Request
from starlette.requests import ClientDisconnect

from api.auth import Caller
from api.content_encoding import refuse_content_encoding
from api.datasets.multipart import MultipartFile
from api.datasets.parameters import UploadParameters
from api.datasets.validation import upload_readers
from api.dependencies import DatabaseDep, SettingsDep, StoreDep, TransferSlot
from api.idempotency.writes import HeldKey, IdempotentWrite, fingerprint_request
from api.sessions import TransactionSlot, transaction_slot
from domain.artifacts import ArtifactStore
from domain.datasets.ingestion import StoredDataset, UploadedFile, store_dataset
from domain.errors import BodyTooLarge, QuotaExceeded, StorageFull, Unavailable, UnsupportedMediaType
from domain.jobs.quotas import admit_upload
from domain.settings import Settings
from pocl.errors import is_disk_full
from pocl.limited_process import ProcessCrashed
from pocl.samples.file_formats import format_of_name
from pocl.samples.limited_storing import SampleStorer, StoringCancelled
from pocl.spec import FileFormat
from pocl.storage.manifest import ManifestFile, sha256_of

JSONL_TYPES = ("application/jsonl", "application/x-ndjson", "application/x-jsonlines")
FORMATS_BY_MEDIA_TYPE: Final[Mapping[str, FileFormat | None]] = {
    **dict.fromkeys(JSONL_TYPES, "jsonl"),
    "application/json": "json",
    "text/csv": "csv",
    "text/tab-separated-values": "csv",
    "application/vnd.apache.parquet": "parquet",
    "application/gzip": None,
    "application/octet-stream": None,
}
"""The media types of a file as the body itself, and the format that each says; the content decides, where it can."""
MULTIPART = "multipart/form-data"
FORM_FIELDS: Final = ("name", "format", "form", "columns", "delimiter", "on_bad_rows")
"""What a form may have besides its file: the parameters of the query, in either place."""
_WRITE_BYTES = 1 << 20
_MULTIPART_OVERHEAD = 1 << 16
"""Bytes of boundaries and part headers that a form may have besides its file."""
_STALE_SECONDS = 24 * 3600
_log = structlog.get_logger(__name__)


class UploadTooLarge(BodyTooLarge):
    """The file is larger than the service accepts: split it, or raise POCL_MAX_UPLOAD_BYTES."""

    code = "upload_too_large"


class FileNotReadNow(Unavailable):
    """The process that reads the file died, maybe for want of memory: send it again."""

    code = "file_not_read_now"


class Upload:
    """A spooled body, and the files of the artifact store that were published from it."""

    def __init__(self, path: Path, store: ArtifactStore) -> None:
        self.path = path
        """The spool file."""
        self.filename: str | None = None
        """The name of the file in a multipart form."""
        self.format_hint: FileFormat | None = None
        """The format that the media type or the name of the file says."""
        self.form_fields: Mapping[str, str] = {}
        """The other fields of a multipart form."""
        self.fingerprint = ""
        """Of the request, where it came with an `Idempotency-Key`."""
        self._store = store
        self._published: list[str] = []

    def publish(self, file: Path, key: str, *, link: bool = False, keep: bool = True) -> ManifestFile:
        """Store a file under `key`, as :meth:`domain.artifacts.ArtifactStore.publish_file` does; it is removed again if
        the request fails.

        Raises:
            StorageFull: there is no space left; nothing is stored then.
        """
        self._published.append(key)
        with raising_storage_full():
            return self._store.publish_file(file, key, link=link, keep=keep)

    def remove_published(self) -> None:
        """Roll the artifact store back: remove what this upload published."""
        for key in self._published:
            self._store.discard(key)


async def _hold_project_upload(request: Request, caller: Caller, database: DatabaseDep) -> AsyncIterator[None]:
    """Count one more upload of the project in this process, before its body is read.

    Raises:
        QuotaExceeded: the project has as many as it may, or its files take as much as they may already.
    """

    def read_limit() -> int | None:
        with database.transaction(write=False) as session:
            return admit_upload(session, caller.project)

    async with transaction_slot():
        limit = await run_sync(read_limit)
    uploads: Counter[str] = request.app.state.uploads
    if limit is not None and uploads[caller.project] >= limit:
        raise QuotaExceeded(f"The project has {limit} uploads in progress, and may have no more: wait for one to end.")
    uploads[caller.project] += 1
    try:
        yield
    finally:
        uploads[caller.project] -= 1
        if not uploads[caller.project]:
            del uploads[caller.project]


async def _get_form_fields(request: Request) -> tuple[str, ...]:
    fields: tuple[str, ...] = getattr(request.state, "upload_form_fields", ())
    return (*FORM_FIELDS, *fields)


FormFields = Annotated[tuple[str, ...], Depends(_get_form_fields)]
"""What the form of an upload may have besides its file; a route may name more as `request.state.upload_form_fields`, in
a dependency that comes before this one."""


async def _receive_upload(
    request: Request,
    _caller: Caller,
    _slot: TransferSlot,
    _upload: Annotated[None, Depends(_hold_project_upload, scope="function")],
    settings: SettingsDep,
    store: StoreDep,
    claim: HeldKey,
    form_fields: FormFields,
) -> AsyncIterator[Upload]:
    refuse_content_encoding(request.headers)
    form, hint = _parse_content_type(request.headers.get("content-type", ""), form_fields)
    upload = Upload(_create_spool_file(spool_directory(settings)), store)
    try:
        with raising_storage_full(), upload.path.open("wb") as spool:
            await _spool_body(request, form, spool, settings.max_upload_bytes)
        upload.format_hint = hint
        if form is not None:
            upload.filename, upload.form_fields = form.filename, form.fields
            upload.format_hint = format_of_name(form.filename or "")
        if claim is not None:
            # Of the file and not of the body: a client that tries again sets another boundary.
            digest = await run_sync(sha256_of, upload.path)
            fields = json.dumps(sorted(upload.form_fields.items())) if upload.form_fields else ""
            content = [digest, upload.filename or "", *([fields] if fields else [])]
            upload.fingerprint = fingerprint_request(request, *(piece.encode() for piece in content))
            claim.compare(upload.fingerprint)
        yield upload
    except BaseException:
        # The errors of the route arrive here, those of a failing commit among them.
        with CancelScope(shield=True):
            await run_sync(upload.remove_published)
        raise
    finally:
        upload.path.unlink(missing_ok=True)


ReceivedUpload = Annotated[Upload, Depends(_receive_upload, scope="function")]


@dataclass(frozen=True)
class StoredUpload:
    """An upload whose samples, unless it is large, are in the artifact store; they are removed again if the request
    fails."""

    upload: Upload
    parameters: UploadParameters
    dataset: StoredDataset | None
    """What was read of the file; null for a large one, which is read afterwards."""
    write: IdempotentWrite
    """Makes the data set once for each `Idempotency-Key`."""


async def _read_upload(
    request: Request, upload: ReceivedUpload, settings: SettingsDep, parameters: Annotated[UploadParameters, Query()]
) -> tuple[UploadParameters, StoredDataset | None]:
    """Read the spooled file, unless it is large, and publish its samples, until the client is gone. It takes seconds
    and more, in which it holds neither a transaction nor one of the threads that answer others.

    Raises:
        FileNotReadNow: the process that reads it died.
    """
    fields = {name: value for name, value in upload.form_fields.items() if name in FORM_FIELDS}
    parameters = parameters.with_form_fields(fields)
    file = UploadedFile(upload.path, parameters.read_options(), upload.format_hint)
    if upload.path.stat().st_size > settings.sync_upload_bytes:
        return parameters, None
    storer = SampleStorer(upload.path)

    def store() -> StoredDataset:
        return store_dataset(file, upload.publish, storer=storer)

    try:
        with raising_storage_full():
            async with _cancelling_on_disconnect(request, storer):
                return parameters, await run_sync(store, limiter=upload_readers.get())
    except StoringCancelled:
        raise ClientDisconnect from None
    except ProcessCrashed as error:
        _log.error("upload_reader_crashed", error=str(error), log=error.log)
        raise FileNotReadNow from error


async def _prepare_write(
    upload: ReceivedUpload,
    claim: HeldKey,
    database: DatabaseDep,
    read: Annotated[tuple[UploadParameters, StoredDataset | None], Depends(_read_upload, scope="function")],
    _slot: TransactionSlot,
) -> StoredUpload:
    parameters, dataset = read
    return StoredUpload(upload, parameters, dataset, IdempotentWrite(database, claim, upload.fingerprint))


StoredUploadDep = Annotated[StoredUpload, Depends(_prepare_write, scope="function")]


@asynccontextmanager
async def _cancelling_on_disconnect(request: Request, storer: SampleStorer) -> AsyncIterator[None]:
    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        storer.cancel()

    task = create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        await wait({task})


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
    """Where bodies are written while they arrive."""
    return settings.home / "uploads"


def remove_stale_spool_files(settings: Settings) -> None:
    """Remove what killed processes left behind a day ago or more: spool files, and what was unpacked of them."""
    for entry in spool_directory(settings).glob("*"):
        with suppress(FileNotFoundError):
            if time.time() - entry.stat().st_mtime <= _STALE_SECONDS:
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()


def _create_spool_file(directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=directory)
    os.close(descriptor)
    return Path(name)


def _parse_content_type(
    content_type: str, form_fields: Collection[str]
) -> tuple[MultipartFile | None, FileFormat | None]:
    """The parser of a multipart form, null for a file as the body itself; and the format that the media type says."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == MULTIPART:
        return MultipartFile(content_type, form_fields), None
    if media_type not in FORMATS_BY_MEDIA_TYPE:
        listed = ", ".join(FORMATS_BY_MEDIA_TYPE)
        raise UnsupportedMediaType(f"Send the samples as {listed}, or as a file in {MULTIPART}.")
    return None, FORMATS_BY_MEDIA_TYPE[media_type]


async def _spool_body(request: Request, form: MultipartFile | None, spool: BinaryIO, limit: int) -> None:
    _check_declared_length(request.headers.get("content-length", ""), limit + (_MULTIPART_OVERHEAD if form else 0))
    body_bytes = file_bytes = 0
    buffer = bytearray()
    async for chunk in request.stream():
        content = chunk if form is None else form.feed(chunk)
        body_bytes += len(chunk)
        file_bytes += len(content)
        if file_bytes > limit or body_bytes > file_bytes + _MULTIPART_OVERHEAD:
            raise UploadTooLarge
        buffer += content
        if len(buffer) >= _WRITE_BYTES:
            await run_sync(spool.write, bytes(buffer))
            buffer.clear()
    if form is not None:
        form.finish()
    await run_sync(spool.write, bytes(buffer))
    await run_sync(spool.flush)


def _check_declared_length(content_length: str, limit: int) -> None:
    # Refused before the client has sent it all.
    if content_length.isdecimal() and int(content_length) > limit:
        raise UploadTooLarge
