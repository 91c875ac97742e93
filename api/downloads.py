"""Stored files as downloads that can be resumed and verified: Range, If-Range, a digest as the strong validator."""

import base64
import re
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from api import etags
from api.client_shares import client_of
from api.dependencies import transfers_of
from api.problems import HttpError
from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore
from domain.errors import ApiError, NotFound
from pocl.storage.manifest import Manifest, ManifestFile

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_MEDIA_TYPES: Final = {
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".html": "text/html; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}
_DEFAULT_MEDIA_TYPE: Final = "application/octet-stream"


class ArtifactFileNotFound(NotFound):
    """There is no such file."""

    code = "file_not_found"


class RangeNotSatisfiable(HttpError):
    """The file ends before the range begins: its size is in `Content-Range`."""

    status = 416
    code = "range_not_satisfiable"

    def __init__(self, size_bytes: int) -> None:
        super().__init__(headers={"content-range": f"bytes */{size_bytes}"})


class ArtifactDamaged(ApiError):
    """The stored files do not match their manifest: check the disk of the service."""

    code = "artifact_damaged"


def download_responses(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation that serves a file: of any media type unless some are given."""
    binary = {"type": "string", "format": "binary"}
    listed = media_types or sorted({each.partition(";")[0] for each in (*_MEDIA_TYPES.values(), _DEFAULT_MEDIA_TYPE)})
    # A JSON file may hold any value.
    content = {media_type: {"schema": {} if media_type == "application/json" else binary} for media_type in listed}
    return {
        200: {"description": "The file.", "content": content},
        206: {"description": "The requested range of the file.", "content": content},
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
    return _serve(_locate(store, key, path), listed, request)


def serve_file(store: ArtifactStore, key: str, sha256: str, size_bytes: int, request: Request) -> Response:
    """Serve a stored file.

    Raises:
        ArtifactFileNotFound: nothing is stored under this key.
        ArtifactDamaged: the file has another size.
        RangeNotSatisfiable: the requested range lies beyond the file.
    """
    name = key.rpartition("/")[2]
    listed = ManifestFile(path=name, size=size_bytes, sha256=sha256)
    return _serve(_locate(store, key), listed, request)


def _locate(store: ArtifactStore, key: str, path: str | None = None) -> Path:
    try:
        return store.locate(key, path)
    except ArtifactNotFound:
        raise ArtifactFileNotFound from None
    except ArtifactCorrupt:
        raise ArtifactDamaged from None


def _serve(path: Path, listed: ManifestFile, request: Request) -> Response:
    etag = f'"{listed.sha256}"'
    if etags.if_none_match(request, etag):
        return etags.not_modified(etag)
    stat = path.stat()
    if stat.st_size != listed.size:
        # The bytes would arrive under a digest that is not theirs.
        raise ArtifactDamaged
    digest = base64.b64encode(bytes.fromhex(listed.sha256)).decode()
    response = _Download(
        path,
        filename=listed.path.rpartition("/")[2],
        media_type=_MEDIA_TYPES.get(path.suffix, _DEFAULT_MEDIA_TYPE),
        stat_result=stat,
        headers={
            "etag": etag,
            "repr-digest": f"sha-256=:{digest}:",
            "cache-control": "private, no-cache",
            # A report that a browser shows gets no script, no network and no share in the service's origin.
            "content-security-policy": (
                "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; sandbox"
            ),
        },
        content_disposition_type="inline" if path.suffix == ".html" else "attachment",
    )
    response.apply_range(request)
    return response


class _Download(FileResponse):
    """A file response that serves one range at most.

    A range that is malformed, or several at once, may be ignored (RFC 9110, section 14.2): the whole file is served
    then, where Starlette would answer with an error in plain text.
    """

    _range_applies = False

    def apply_range(self, request: Request) -> None:
        """Decide whether the request's range applies.

        Raises:
            RangeNotSatisfiable: the range lies beyond the file.
        """
        requested = _RANGE.fullmatch(request.headers.get("range", ""))
        if_range = request.headers.get("if-range")
        if requested is None or requested[0] == "bytes=-" or if_range not in (None, self.headers["etag"]):
            return
        first, last = requested[1], requested[2]
        if first and last and int(last) < int(first):
            return
        assert self.stat_result is not None
        size = self.stat_result.st_size
        if size == 0 or (int(first) >= size if first else int(last) == 0):
            raise RangeNotSatisfiable(size)
        self._range_applies = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._range_applies:
            headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
            scope = {**scope, "headers": headers}
        with transfers_of(Request(scope)).hold(client_of(scope)):
            await super().__call__(scope, receive, send)
