"""Entity tags and conditional requests (RFC 9110, section 13)."""

import hashlib

from starlette.requests import Request
from starlette.responses import Response


def strong(content: bytes) -> str:
    """The tag of a representation: equal bytes, equal tag."""
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def if_none_match(request: Request, etag: str) -> bool:
    """Whether `If-None-Match` says that the client holds this representation already."""
    # The comparison is weak (section 13.1.2).
    offered = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return "*" in offered or etag in offered


def not_modified(etag: str) -> Response:
    return Response(status_code=304, headers={"etag": etag})
