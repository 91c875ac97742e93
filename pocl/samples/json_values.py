"""JSON values of a file: the elements of one array, or objects one after the other, in any layout.

They are told apart by brackets and strings alone, a piece of the file at a time; each is parsed by itself.
"""

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from pocl.errors import DatasetInvalid
from pocl.samples.strict_json import MAX_DEPTH

_CHUNK: Final = 1 << 16
_STRUCTURE = re.compile(rb'["\[\]{},]')
_STRING_END = re.compile(rb'["\\]')
_OPENING: Final = b"[{"
_CLOSING: Final = b"]}"


def split_values(stream: BinaryIO, limit: int) -> Iterator[bytes | None]:
    """The text of each value, in the order of the file; what stands between values is a value of its own.

    None stands for a value of more than `limit` bytes, of which only the beginning is in memory.

    Raises:
        DatasetInvalid: the array, or a value, is not closed or nests too deep, or something follows the array.
    """
    splitter = _Splitter(limit)
    while chunk := stream.read(_CHUNK):
        yield from splitter.feed(chunk)
    yield from splitter.finish()


class _Splitter:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._is_array: bool | None = None
        self._closed = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._value = bytearray()
        self._too_long = False
        self._after_comma = False

    def feed(self, chunk: bytes) -> Iterator[bytes | None]:
        position = 0
        if self._is_array is None:
            chunk = chunk.removeprefix(codecs.BOM_UTF8).lstrip()
            if not chunk:
                return
            self._is_array = chunk.startswith(b"[")
            position = int(self._is_array)
        while position < len(chunk):
            if self._in_string:
                position = self._skip_string(chunk, position)
                continue
            match = _STRUCTURE.search(chunk, position)
            stop = len(chunk) if match is None else match.start()
            self._take(chunk[position:stop])
            if match is None:
                return
            position = match.end()
            yield from self._structure(match.group())

    def finish(self) -> Iterator[bytes | None]:
        if self._depth or self._in_string or (self._is_array and not self._closed):
            raise DatasetInvalid("The file breaks off within a JSON value: send it again, whole.")
        yield from self._end_value()

    def _structure(self, token: bytes) -> Iterator[bytes | None]:
        if token == b'"':
            self._in_string = True
            self._take(token)
        elif token in _OPENING:
            if not self._depth and not self._is_array:
                # What stands between two objects.
                yield from self._end_value()
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise DatasetInvalid(f"A value of the file is nested more than {MAX_DEPTH} deep, or is no JSON.")
            self._take(token)
        elif token in _CLOSING and self._depth:
            self._depth -= 1
            self._take(token)
            if not self._depth and not self._is_array:
                yield from self._end_value()
        elif self._is_array and not self._closed and not self._depth:
            yield from self._end_value(separated=token == b"," or self._after_comma)
            self._after_comma = token == b","
            self._closed = token == b"]"
        else:
            self._take(token)

    def _skip_string(self, chunk: bytes, position: int) -> int:
        if self._escaped:
            self._escaped = False
            self._take(chunk[position : position + 1])
            return position + 1
        match = _STRING_END.search(chunk, position)
        stop = len(chunk) if match is None else match.end()
        self._take(chunk[position:stop])
        if match is not None:
            self._escaped = match.group() == b"\\"
            self._in_string = self._escaped
        return stop

    def _take(self, piece: bytes) -> None:
        if self._closed:
            if piece.strip():
                raise DatasetInvalid("Something follows the JSON array of the file: remove it.")
        elif len(self._value) + len(piece) <= self._limit:
            self._value += piece
        else:
            self._too_long = True

    def _end_value(self, *, separated: bool = False) -> Iterator[bytes | None]:
        value = bytes(self._value).strip()
        if self._too_long:
            yield None
        elif value or separated:
            yield value
        self._value.clear()
        self._too_long = False
