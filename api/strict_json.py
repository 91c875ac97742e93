"""JSON bodies read within bounds: size, nesting, finite numbers, and only text that a database can hold."""

import codecs
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import JsonValue

from api.bounded_body import read_bounded
from domain.errors import JsonInvalid, UnsupportedMediaType

MAX_DEPTH = 32
"""A specification nests five levels deep."""


class StrictJsonRoute(APIRoute):
    """Reads a JSON body before FastAPI does, so that every refusal has an error code of this service.

    FastAPI's own body limit answers in plain text, and its parser admits NaN and any nesting.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_then_handle(request: Request) -> Response:
            strict = _StrictRequest(request.scope, request.receive)
            await strict.json()
            return await handle(strict)

        return read_then_handle


class _StrictRequest(Request):
    _parsed: JsonValue = None
    _content: bytes | None = None

    async def body(self) -> bytes:
        if self._content is None:
            declared = self.headers.get("content-type")
            if declared is not None:
                _require_json(declared)
            read = await read_bounded(self, "A JSON body")
            if declared is None and read:
                # Some bodies are optional; one that is sent declares its type.
                _require_json("")
            self._content = read
            self._parsed = parse(self._content) if self._content else None
        return self._content

    @property
    def content(self) -> bytes:
        return self._content or b""

    async def json(self) -> JsonValue:
        await self.body()
        return self._parsed


def body_of(request: Request) -> bytes:
    """The body as a :class:`StrictJsonRoute` has read it; empty for a route that takes none."""
    return request.content if isinstance(request, _StrictRequest) else b""


def parse(text: bytes) -> JsonValue:
    """Parse JSON in UTF-8, with or without a byte order mark, as RFC 8259 allows a parser to.

    Raises:
        JsonInvalid: for text that is not JSON (NaN is not), nests too deep, or holds the character NUL.
    """
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise JsonInvalid("The body is in UTF-16 or UTF-32: send it in UTF-8.")
    text = text.removeprefix(codecs.BOM_UTF8)
    try:
        value: JsonValue = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        # The parser's sentence may quote the text; the position does not.
        raise JsonInvalid(f"The body is not JSON: see line {error.lineno}, column {error.colno}.") from None
    _refuse_depth_and_nul(value)
    return value


def _require_json(content_type: str) -> None:
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise UnsupportedMediaType("Send the body as application/json.")


def _refuse_depth_and_nul(value: JsonValue) -> None:
    level: list[JsonValue] = [value]
    for _ in range(MAX_DEPTH):
        below: list[JsonValue] = []
        for item in level:
            if isinstance(item, str):
                _refuse_nul(item)
            elif isinstance(item, dict):
                for key in item:
                    _refuse_nul(key)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return
        level = below
    raise JsonInvalid(f"The body nests deeper than {MAX_DEPTH} levels.")


def _refuse_nul(text: str) -> None:
    # PostgreSQL stores no such text.
    if "\0" in text:
        raise JsonInvalid("The body holds the character U+0000; remove it.")
