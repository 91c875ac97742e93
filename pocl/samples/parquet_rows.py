"""Rows of a Parquet file, in memory a few at a time. It is decoded in a child process with limits."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from pocl.errors import DatasetInvalid
from pocl.limited_process import LimitedProcess, ProcessFailed
from pocl.samples.values import Fields

_MEMORY_BYTES: Final = 1 << 30
_CALL_SECONDS: Final = 60
"""Of the processor, for some rows."""


class ParquetRows:
    """A Parquet file, of which only columns that are used are read. Iterating gives its rows, numbered from 1.

    Raises:
        DatasetInvalid: it is damaged, or of a kind that cannot be read.
    """

    def __init__(self, path: Path, used: Collection[str]) -> None:
        self._process = LimitedProcess("pocl.samples.parquet_process", memory_bytes=_MEMORY_BYTES)
        self._request = {"path": str(path.absolute()), "used": sorted(used)}
        self.read: list[str] = []
        """Columns that are used."""
        self.unread: list[str] = []
        """Columns that are not."""

    def __enter__(self) -> Self:
        try:
            opened = self._call(self._request)
        except BaseException:
            self._process.close()
            raise
        self.read, self.unread = opened["read"], opened["unread"]
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._process.close()

    def __iter__(self) -> Iterator[tuple[int, Fields]]:
        number = 0
        while rows := json.loads(self._call({})["rows"]):
            for row in rows:
                number += 1
                yield number, row

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:  # Any: values of JSON.
        try:
            answer: dict[str, Any] = self._process.call(request, seconds=_CALL_SECONDS)
        except ProcessFailed as error:
            raise DatasetInvalid(f"The Parquet file cannot be read: decoding it {error}.") from error
        if "twice" in answer:
            raise DatasetInvalid(f"The Parquet file has the column {answer['twice'][:40]!r} twice: rename one.")
        if "damaged" in answer:
            raise DatasetInvalid("The Parquet file is damaged, or of a kind that cannot be read: write it anew.")
        return answer
