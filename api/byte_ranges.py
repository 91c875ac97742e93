"""Responses of which a client may have one range of bytes (RFC 9110, section 14)."""

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Final

from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.client_shares import client_of
from api.dependencies import transfers_of
from api.loop_limiters import LoopLimiter
from api.problems import HttpError

_RANGE: Final = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_readers: Final = LoopLimiter("range_readers", 64)
"""The turns of one API process at reading: they take no thread from the routes."""


class RangeNotSatisfiable(HttpError):
    """The file ends before the range begins: its size is in `Content-Range`."""

    status = 416
    code = "range_not_satisfiable"

    def __init__(self, size_bytes: int) -> None:
        super().__init__(headers={"content-range": f"bytes */{size_bytes}"})


def requested_range(request: Request, etag: str, size_bytes: int) -> tuple[int, int] | None:
    """The first byte that a request asks for and the one after the last; null where it gets the whole.

    A range that is malformed, or several at once, may be ignored (section 14.2), and so is one whose `If-Range` names
    another representation.

    Raises:
        RangeNotSatisfiable: the range lies beyond the end.
    """
    requested = _RANGE.fullmatch(request.headers.get("range", ""))
    if requested is None or requested[0] == "bytes=-" or request.headers.get("if-range") not in (None, etag):
        return None
    first, last = requested[1], requested[2]
    if first and last and int(last) < int(first):
        return None
    if size_bytes == 0 or (int(first) >= size_bytes if first else int(last) == 0):
        raise RangeNotSatisfiable(size_bytes)
    if not first:
        return max(0, size_bytes - int(last)), size_bytes
    return int(first), min(int(last) + 1, size_bytes) if last else size_bytes


class RangedStream(StreamingResponse):
    """Bytes that are read while they are sent, piece by piece: all of them or one range. A HEAD reads none."""

    def __init__(
        self,
        read: Callable[[int, int], Iterator[bytes]],
        size_bytes: int,
        request: Request,
        *,
        etag: str,
        media_type: str,
        headers: Mapping[str, str],
    ) -> None:
        """Args:
            read: the bytes from the one number up to the other.
            headers: besides those of the entity tag, the length and the range.

        Raises:
            RangeNotSatisfiable: the requested range lies beyond the end.
        """
        wanted = requested_range(request, etag, size_bytes)
        start, stop = wanted or (0, size_bytes)
        lengths = {"etag": etag, "accept-ranges": "bytes", "content-length": str(stop - start)}
        if wanted is not None:
            lengths["content-range"] = f"bytes {start}-{stop - 1}/{size_bytes}"
        super().__init__(
            _in_threads(lambda: read(start, stop)),
            status_code=200 if wanted is None else 206,
            headers={**headers, **lengths},
            media_type=media_type,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        with transfers_of(Request(scope)).hold(client_of(scope)):
            await super().__call__(scope, receive, send)


async def _in_threads(read: Callable[[], Iterator[bytes]]) -> AsyncIterator[bytes]:
    pieces = await run_sync(read, limiter=_readers.get())
    while (piece := await run_sync(next, pieces, None, limiter=_readers.get())) is not None:
        yield piece
