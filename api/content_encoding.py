"""Bodies come as they are: no content coding is undone, since a small body may unpack to any size."""

from starlette.datastructures import Headers

from api.problems import HttpError


class ContentEncodingUnsupported(HttpError):
    """Send the body without Content-Encoding; a data set in gzip may be sent as `Content-Type: application/gzip`."""

    status = 415
    code = "content_encoding_unsupported"

    def __init__(self) -> None:
        super().__init__(headers={"accept-encoding": "identity"})


def refuse_content_encoding(headers: Headers) -> None:
    """
    Raises:
        ContentEncodingUnsupported: the request names a coding of its body.
    """
    codings = ",".join(headers.getlist("content-encoding")).split(",")
    if any(coding.strip().lower() not in ("", "identity") for coding in codings):
        raise ContentEncodingUnsupported
