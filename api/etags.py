"""Conditional requests by entity tags (RFC 9110, section 13)."""

from starlette.requests import Request
from starlette.responses import Response


def if_none_match(request: Request, etag: str) -> bool:
    """Whether `If-None-Match` says that the client has the representation of this tag already."""
    # The comparison is weak (section 13.1.2): a validator that a proxy weakened still matches.
    tags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return "*" in tags or etag in tags


def not_modified(etag: str) -> Response:
    """The response 304 to a conditional request whose tag matches."""
    return Response(status_code=304, headers={"etag": etag})
