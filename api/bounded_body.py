"""A body that is read whole, into memory."""

from fastapi import Request

from api.content_encoding import refuse_content_encoding
from api.dependencies import settings_of
from domain.errors import BodyTooLarge


async def read_bounded(request: Request, kind: str) -> bytes:
    """The body of a request as it came.

    Args:
        kind: what the body is, as the refusal names it: `A form`.

    Raises:
        ContentEncodingUnsupported: the request names a coding of its body.
        BodyTooLarge: it is longer than `POCL_MAX_REQUEST_BYTES`, whatever length its head declares.
    """
    refuse_content_encoding(request.headers)
    limit = settings_of(request).max_request_bytes
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BodyTooLarge(f"{kind} may have at most {limit} bytes.")
    return bytes(body)
