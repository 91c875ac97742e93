"""The scripts and styles of the pages, all of them out of this package: no page asks another server for anything."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Response

from domain.errors import NotFound

router = APIRouter(prefix="/ui/static", include_in_schema=False)

STATIC: Final = Path(__file__).with_name("static")
MEDIA_TYPES: Final = {
    "htmx.min.js": "text/javascript",
    "uplot.min.js": "text/javascript",
    "dashboard.js": "text/javascript",
    "uplot.min.css": "text/css",
    "dashboard.css": "text/css",
    "icon.svg": "image/svg+xml",
}
"""The files that are served, with their media types."""


@dataclass(frozen=True)
class StaticFile:
    """A file as it is served."""

    content: bytes
    digest: str
    """Names this content: the address of another content is another one, so that browsers keep a file for good."""


@cache
def static_file(name: str) -> StaticFile:
    """A file of :data:`MEDIA_TYPES`, read once."""
    content = (STATIC / name).read_bytes()
    return StaticFile(content, hashlib.sha256(content).hexdigest()[:12])


def static_path(name: str) -> str:
    """The path of a file, below the prefix of the service."""
    return f"/ui/static/{static_file(name).digest}/{name}"


@router.get("/{digest}/{name}")
def get_static_file(digest: str, name: str) -> Response:
    """A script or style."""
    if name not in MEDIA_TYPES or digest != static_file(name).digest:
        raise NotFound
    headers = {"cache-control": "public, max-age=31536000, immutable"}
    return Response(static_file(name).content, media_type=MEDIA_TYPES[name], headers=headers)
