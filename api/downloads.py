"""Stored files as downloads that can be continued and verified: Range, If-Range, a digest as the entity tag."""

import base64
import re
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from api import etags
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
_UNKNOWN_TYPE: Final = "application/octet-stream"


class FileNotInArtifact(NotFound):
    """There is no such file."""

    code = "file_not_found"


class RangeNotSatisfiable(HttpError):
    """The file ends before the range begins: its size is in `Content-Range`."""

    status = 416
    code = "range_not_satisfiable"

    def __init__(self, size_bytes: int) -> None:
        super().__init__(headers={"content-range": f"bytes */{size_bytes}"})


class ArtifactDamaged(ApiError):
    """The stored files are not what they were: the disk of the service needs a look."""

    code = "artifact_damaged"


def download_responses(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation that serves a file: of any type unless some are named."""
    bytes_of_a_file = {"type": "string", "format": "binary"}
    named = media_types or sorted({kind.partition(";")[0] for kind in (*_MEDIA_TYPES.values(), _UNKNOWN_TYPE)})
    # Parsed as JSON a file is any value.
    content = {kind: {"schema": {} if kind == "application/json" else bytes_of_a_file} for kind in named}
    return {
        200: {"description": "The file.", "content": content},
        206: {"description": "The range that was asked for.", "content": content},
        304: {"description": "`If-None-Match` names the file: it is the one that the client has."},
    }


def load_manifest(store: ArtifactStore, key: str) -> Manifest:
    """The files of a stored directory.

    Raises:
        FileNotInArtifact, ArtifactDamaged: it is gone, or its manifest is.
    """
    try:
        return store.manifest(key)
    except ArtifactNotFound:
        raise FileNotInArtifact from None
    except ArtifactCorrupt:
        raise ArtifactDamaged from None


def serve_directory_file(store: ArtifactStore, key: str, path: str, request: Request) -> Response:
    """Serve `path` of a stored directory, as its manifest names it.

    Raises:
        FileNotInArtifact: the manifest names no such file; so it is for every path that would lead elsewhere.
        ArtifactDamaged, RangeNotSatisfiable
    """
    listed = next((file for file in load_manifest(store, key).files if file.path == path), None)
    if listed is None:
        raise FileNotInArtifact
    return _serve(_located(store, key, path), listed, request)


def serve_file(store: ArtifactStore, key: str, sha256: str, size_bytes: int, request: Request) -> Response:
    """Serve a stored file.

    Raises:
        FileNotInArtifact, ArtifactDamaged, RangeNotSatisfiable
    """
    name = key.rpartition("/")[2]
    listed = ManifestFile(path=name, size=size_bytes, sha256=sha256)
    return _serve(_located(store, key), listed, request)


def _located(store: ArtifactStore, key: str, path: str | None = None) -> Path:
    try:
        return store.locate(key, path)
    except ArtifactNotFound:
        raise FileNotInArtifact from None
    except ArtifactCorrupt:
        raise ArtifactDamaged from None


def _serve(place: Path, listed: ManifestFile, request: Request) -> Response:
    etag = f'"{listed.sha256}"'
    if etags.if_none_match(request, etag):
        return etags.not_modified(etag)
    found = place.stat()
    if found.st_size != listed.size:
        # Its bytes would arrive under a digest that is not theirs.
        raise ArtifactDamaged
    digest = base64.b64encode(bytes.fromhex(listed.sha256)).decode()
    response = _Download(
        place,
        filename=listed.path.rpartition("/")[2],
        media_type=_MEDIA_TYPES.get(place.suffix, _UNKNOWN_TYPE),
        stat_result=found,
        headers={
            "etag": etag,
            "repr-digest": f"sha-256=:{digest}:",
            "cache-control": "private, no-cache",
            # A page that a browser shows gets no script, no network and no share in the service's origin.
            "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox",
        },
        content_disposition_type="inline" if place.suffix == ".html" else "attachment",
    )
    response.apply_range(request)
    return response


class _Download(FileResponse):
    """A file of which one range at most is asked for.

    A range that is not understood, or several at once, may be ignored (RFC 9110, section 14.2): the whole file
    is the answer then, where Starlette's own would be an error in plain text.
    """

    _range_applies = False

    def apply_range(self, request: Request) -> None:
        """Decide about the request's range.

        Raises:
            RangeNotSatisfiable: the range lies beyond the file.
        """
        asked = _RANGE.fullmatch(request.headers.get("range", ""))
        if_range = request.headers.get("if-range")
        if asked is None or asked[0] == "bytes=-" or if_range not in (None, self.headers["etag"]):
            return
        first, last = asked[1], asked[2]
        if first and last and int(last) < int(first):
            return
        assert self.stat_result is not None
        size = self.stat_result.st_size
        if size == 0 or (int(first) >= size if first else int(last) == 0):
            raise RangeNotSatisfiable(size)
        self._range_applies = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._range_applies:
            kept = [(name, value) for name, value in scope["headers"] if name != b"range"]
            scope = {**scope, "headers": kept}
        await super().__call__(scope, receive, send)
