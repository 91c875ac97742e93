"""Stored files as downloads that can be resumed and verified: Range, If-Range, a digest as the strong validator."""

import base64
import os
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from api import etags
from api.archives import TarArchive
from api.byte_ranges import RangedStream, requested_range
from api.client_shares import client_of
from api.dependencies import settings_of, transfers_of
from domain.artifacts import MEDIA_TYPES, ArtifactCorrupt, ArtifactNotFound, ArtifactStore, media_type_of
from domain.errors import ApiError, NotFound
from pocl.storage.manifest import Manifest, ManifestFile

ARCHIVE_MEDIA_TYPE: Final = "application/x-tar"
_BYTES: Final = "application/octet-stream"
_MIN_REDIRECTED_BYTES: Final = 2**20
"""Smaller files come through the API: a second request would take longer than they do."""
_HTML: Final = ".html"
# A report that a browser shows gets no script, no network and no share in the service's origin.
_CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; sandbox"
)


class ArtifactFileNotFound(NotFound):
    """There is no such file."""

    code = "file_not_found"


class ArtifactDamaged(ApiError):
    """The stored files do not match their manifest: check the disk of the service."""

    code = "artifact_damaged"


def download_responses(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation that serves a file: of any media type unless some are given."""
    binary = {"type": "string", "format": "binary"}
    # Generated clients read every response as the first type that they know: bytes, where it may be any file.
    listed = media_types or sorted(
        {each.partition(";")[0] for each in MEDIA_TYPES}, key=lambda each: (each != _BYTES, each)
    )
    # A JSON file may hold any value.
    content = {media_type: {"schema": {} if media_type == "application/json" else binary} for media_type in listed}
    return {
        200: {"description": "The file.", "content": content},
        206: {"description": "The requested range of the file.", "content": content},
        307: {
            "description": "The file is at the address in `Location` for a while: it is 1 MiB or more, and in a bucket."
            " `X-File-Size` and `Repr-Digest` say what arrives there.",
        },
        304: {"description": "The entity tag in `If-None-Match` is that of the file: the client has it already."},
    }


def load_manifest(store: ArtifactStore, key: str) -> Manifest:
    """The files of a stored directory.

    Raises:
        ArtifactFileNotFound: nothing is stored under this key.
        ArtifactDamaged: its manifest cannot be read.
    """
    try:
        return store.manifest(key)
    except ArtifactNotFound:
        raise ArtifactFileNotFound from None
    except ArtifactCorrupt:
        raise ArtifactDamaged from None


def serve_directory_file(store: ArtifactStore, key: str, path: str, request: Request) -> Response:
    """Serve `path` of a stored directory, as its manifest names it.

    Raises:
        ArtifactFileNotFound: the manifest names no such file, as is so for every path that leads out of the directory.
        ArtifactDamaged: the file is not as the manifest has it.
        RangeNotSatisfiable: the requested range lies beyond the file.
    """
    listed = next((file for file in load_manifest(store, key).files if file.path == path), None)
    if listed is None:
        raise ArtifactFileNotFound
    return _serve(store, key, path, listed, request)


def serve_file(store: ArtifactStore, key: str, sha256: str, size_bytes: int, request: Request) -> Response:
    """Serve a stored file.

    Raises:
        ArtifactFileNotFound: nothing is stored under this key.
        ArtifactDamaged: the file has another size.
        RangeNotSatisfiable: the requested range lies beyond the file.
    """
    name = key.rpartition("/")[2]
    listed = ManifestFile(path=name, size=size_bytes, sha256=sha256)
    return _serve(store, key, None, listed, request)


def serve_archive(store: ArtifactStore, key: str, request: Request, *, name: str, modified_at: datetime) -> Response:
    """Serve a stored directory as a tar file that unpacks to the directory `name`.

    Raises:
        ArtifactFileNotFound: nothing is stored under this key.
        ArtifactDamaged: a file is not as the manifest has it.
        RangeNotSatisfiable: the requested range lies beyond the archive.
    """
    manifest = load_manifest(store, key)
    archive = TarArchive.create(manifest, folder=name, modified_at=modified_at)
    etag = f'"{archive.digest}"'
    if etags.if_none_match(request, etag):
        return etags.not_modified(etag)
    for file in () if store.is_remote else manifest.files:
        _check_size(_locate(store, key, file.path), file)
    return RangedStream(
        lambda start, stop: archive.read(store, key, start, stop),
        archive.size_bytes,
        request,
        etag=etag,
        media_type=ARCHIVE_MEDIA_TYPE,
        headers={"cache-control": "private, no-cache", "content-disposition": f'attachment; filename="{name}.tar"'},
    )


def _locate(store: ArtifactStore, key: str, path: str | None = None) -> Path:
    try:
        return store.locate(key, path)
    except ArtifactNotFound:
        raise ArtifactFileNotFound from None
    except ArtifactCorrupt:
        raise ArtifactDamaged from None


def _serve(store: ArtifactStore, key: str, path: str | None, listed: ManifestFile, request: Request) -> Response:
    etag = f'"{listed.sha256}"'
    if etags.if_none_match(request, etag):
        return etags.not_modified(etag)
    if store.is_remote:
        return _redirect(store, key, path, listed, request) or _proxy(store, key, path, listed, request)
    local = _locate(store, key, path)
    response = _Download(
        local,
        media_type=media_type_of(listed.path),
        stat_result=_check_size(local, listed),
        headers=_file_headers(listed),
    )
    response.apply_range(request)
    return response


def _redirect(
    store: ArtifactStore, key: str, path: str | None, listed: ManifestFile, request: Request
) -> Response | None:
    """Send the client to the bucket; null where it gets the file here."""
    settings = settings_of(request)
    if (
        settings.artifact_downloads == "proxy"
        or listed.size < _MIN_REDIRECTED_BYTES
        or listed.path.endswith(_HTML)
        or (address := store.address(key, path, "HEAD" if request.method == "HEAD" else "GET")) is None
    ):
        return None
    headers = {**_file_headers(listed), "location": address, "x-file-size": str(listed.size)}
    # The address is a secret, and is good for a while only.
    return Response(status_code=307, headers={**headers, "cache-control": "no-store"})


def _proxy(store: ArtifactStore, key: str, path: str | None, listed: ManifestFile, request: Request) -> Response:
    headers = _file_headers(listed)
    return RangedStream(
        lambda start, stop: store.read(key, path, start, stop),
        listed.size,
        request,
        etag=headers.pop("etag"),
        media_type=media_type_of(listed.path),
        headers=headers,
    )


def _file_headers(listed: ManifestFile) -> dict[str, str]:
    """What is said of a file, however it is sent."""
    name = listed.path.rpartition("/")[2]
    kind = "inline" if name.endswith(_HTML) else "attachment"
    quoted = quote(name)
    filename = f'filename="{name}"' if quoted == name else f"filename*=utf-8''{quoted}"
    return {
        "etag": f'"{listed.sha256}"',
        "repr-digest": f"sha-256=:{base64.b64encode(bytes.fromhex(listed.sha256)).decode()}:",
        "cache-control": "private, no-cache",
        "content-disposition": f"{kind}; {filename}",
        "content-security-policy": _CONTENT_SECURITY_POLICY,
    }


def _check_size(path: Path, listed: ManifestFile) -> os.stat_result:
    stat = path.stat()
    if stat.st_size != listed.size:
        # The bytes would arrive under a digest that is not theirs.
        raise ArtifactDamaged
    return stat


class _Download(FileResponse):
    """A file response that serves one range at most, where Starlette would answer a malformed one, or several at once,
    with an error in plain text.
    """

    _range_applies = False

    def apply_range(self, request: Request) -> None:
        """Decide whether the request's range applies.

        Raises:
            RangeNotSatisfiable: the range lies beyond the file.
        """
        assert self.stat_result is not None
        self._range_applies = requested_range(request, self.headers["etag"], self.stat_result.st_size) is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._range_applies:
            headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
            scope = {**scope, "headers": headers}
        with transfers_of(Request(scope)).hold(client_of(scope)):
            await super().__call__(scope, receive, send)
