"""Forms of the pages: read within bounds, and taken from pages of this service alone."""

import hmac
from typing import Annotated, Final
from urllib.parse import parse_qsl

from fastapi import Depends, Request
from starlette.datastructures import ImmutableMultiDict

from api.auth import CrossSiteRequest
from api.bounded_body import read_bounded
from api.browser_sessions import Session
from api.principal import SAFE_METHODS
from domain.errors import Unprocessable, UnsupportedMediaType

TOKEN_FIELD: Final = "form_token"
_TOKEN_HEADER: Final = "x-form-token"
"""Carries the token in place of the field where a form sends a file, whose parts are read elsewhere."""
_MEDIA_TYPE: Final = "application/x-www-form-urlencoded"
_MAX_FIELDS: Final = 1000

FormFields = ImmutableMultiDict[str, str]


async def read_form(request: Request) -> FormFields:
    """The fields of a form.

    Raises:
        UnsupportedMediaType, Unprocessable: the body is no form.
        ContentEncodingUnsupported, BodyTooLarge: as of :func:`read_bounded`.
    """
    known: FormFields | None = getattr(request.state, "form", None)
    if known is not None:
        return known
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _MEDIA_TYPE:
        raise UnsupportedMediaType(f"Send the form as {_MEDIA_TYPE}.")
    body = await read_bounded(request, "A form")
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS)
    except ValueError:
        raise Unprocessable("The body is no form: send percent-encoded UTF-8.") from None
    if any("\0" in text for pair in pairs for text in pair):
        raise Unprocessable("The form holds the character U+0000; remove it.")
    request.state.form = form = ImmutableMultiDict(pairs)
    return form


Form = Annotated[FormFields, Depends(read_form)]


async def require_form_token(request: Request) -> None:
    """
    Raises:
        CrossSiteRequest: the request changes something with the cookie of a session, and lacks the token that forms of
            its pages carry.
    """
    session: Session | None = getattr(request.state, "session", None)
    if request.method in SAFE_METHODS or session is None:
        # A key in the header `Authorization` was put there on purpose.
        return
    token = request.headers.get(_TOKEN_HEADER)
    if token is None:
        token = (await read_form(request)).get(TOKEN_FIELD, "")
    if not hmac.compare_digest(token.encode(), session.form_token.encode()):
        raise CrossSiteRequest
