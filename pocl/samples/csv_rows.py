"""Rows of CSV: a header, then a row on each line, with quoted fields that may hold line ends."""

import csv
import io
from collections.abc import Collection, Iterator
from typing import BinaryIO, Final, TextIO

from pocl.errors import DatasetInvalid
from pocl.samples.row_invalid import RowInvalid
from pocl.samples.values import Fields

DELIMITERS: Final = (",", "\t", ";", "|")
# The limit holds for the process; rows are bounded here, by the bytes of their lines.
csv.field_size_limit(1 << 24)


def read_csv(
    stream: BinaryIO, *, delimiter: str | None, known: Collection[str], limit: int
) -> Iterator[tuple[int, Fields | RowInvalid]]:
    """The rows by the names of their columns, with the number of their first line, counted from 1; empty is None.

    Args:
        delimiter: None takes the one with which the header has the most of the `known` names.
        limit: the most characters of a row.

    Raises:
        DatasetInvalid: the header cannot be used.
    """
    # TextIOWrapper would close the stream, which is its opener's to close.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _rows(_BoundedLines(text, limit), delimiter, known, limit)
    finally:
        text.detach()


def choose_delimiter(header: str, known: Collection[str]) -> str:
    """The delimiter with which the header has the most known names, and then the most names."""

    def quality(delimiter: str) -> tuple[int, int]:
        names = _split(header, delimiter)
        return len({name.strip() for name in names} & set(known)), len(names)

    return max(DELIMITERS, key=quality)


def known_names(header: str, known: Collection[str]) -> int:
    """How many known names a line has as a header of CSV."""
    return max(len({name.strip() for name in _split(header, each)} & set(known)) for each in DELIMITERS)


def _rows(
    lines: "_BoundedLines", delimiter: str | None, known: Collection[str], limit: int
) -> Iterator[tuple[int, Fields | RowInvalid]]:
    delimiter = delimiter or choose_delimiter(lines.peek(), known)
    names = _header(lines, delimiter)
    while True:
        first = lines.number + 1
        try:
            values = next(_reader(lines, delimiter), None)
        except _RowTooLong:
            yield (
                first,
                RowInvalid("line_too_long", f"The row has more than {limit} characters, or a quote is not closed."),
            )
            continue
        except csv.Error as error:
            yield first, RowInvalid("not_csv", f"The row is not CSV: {error}.")
            continue
        if values is None:
            return
        if values:
            yield first, _fields(names, values)


class _RowTooLong(Exception):
    """The lines of a row have more characters than they may."""


class _BoundedLines:
    """The lines of a file as text. Bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, text: TextIO, limit: int) -> None:
        self._text = text
        self._limit = limit
        self._peeked: str | None = None
        self._size = 0
        self.number = 0
        """Of the line that was read last, counted from 1."""

    def begin_row(self) -> None:
        self._size = 0

    def peek(self) -> str:
        self._peeked = self._text.readline(self._limit + 1)
        return self._peeked

    def __iter__(self) -> "_BoundedLines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._limit + 1) if self._peeked is None else self._peeked
        self._peeked = None
        if not line:
            raise StopIteration
        self.number += 1
        self._size += len(line)
        if self._size > self._limit:
            while not line.endswith(("\n", "\r")) and (line := self._text.readline(self._limit)):
                pass
            raise _RowTooLong
        return line


def _reader(lines: _BoundedLines, delimiter: str) -> Iterator[list[str]]:
    # A reader for each row: after an error nothing of a row is left in it.
    lines.begin_row()
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _header(lines: _BoundedLines, delimiter: str) -> list[str]:
    try:
        values = next((row for row in iter(lambda: next(_reader(lines, delimiter), None), None) if row), None)
    except (_RowTooLong, csv.Error):
        raise DatasetInvalid(
            "The first line of the CSV file is no header: write the names of the columns there."
        ) from None
    if values is None:
        return []
    # A data frame writes its index without a name.
    names = [name.strip() or f"(unnamed column {index})" for index, name in enumerate(values, start=1)]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise DatasetInvalid(f"The header of the CSV file has the column {twice[:40]!r} twice: rename one.")
    return names


def _fields(names: list[str], values: list[str]) -> Fields | RowInvalid:
    if len(values) != len(names):
        return RowInvalid("wrong_columns", f"The row has {len(values)} fields, and the header {len(names)}.")
    if any(not value.isascii() and _has_surrogate(value) for value in values):
        return RowInvalid("not_utf8", "The row is not UTF-8: save the file as UTF-8.")
    return {name: value or None for name, value in zip(names, values, strict=True)}


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []
