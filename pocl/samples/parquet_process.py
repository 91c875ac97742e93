"""Decodes a Parquet file a few rows at a time, in a child process with limits (see :mod:`pocl.limited_process`).

The first request names the file and the columns that are used; each further one is for the next rows.
"""

from collections.abc import Iterator
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

_BATCH_ROWS: Final = 64
_BUFFER_BYTES: Final = 1 << 20
"""Of a column that are read from the file at a time; without it a whole column of a row group is."""
_MAX_METADATA_BYTES: Final = 64 << 20
_ANSWER_BYTES: Final = 1 << 20
"""An answer ends with the row that makes it longer."""
_ERRORS: Final = (pa.ArrowException, OSError, ValueError, KeyError)

_rows: list[Iterator[bytes]] = []
"""The rows of the open file that are not read yet; empty before the first request."""


def answer(request: dict[str, Any]) -> dict[str, Any]:  # Any: values of JSON.
    """Open a file: `{"path": ..., "used": [...]}`, or read on: `{}`.

    Returns:
        `read` and `unread`, the columns of the file that are used and those that are not; or `rows`, the JSON of an
        array of objects, empty at the end of the file; or `damaged`, true.
    """
    try:
        return _open(request["path"], set(request["used"])) if request else {"rows": _next_rows(_rows[0])}
    except _ERRORS:
        return {"damaged": True}


def _open(path: str, used: set[str]) -> dict[str, Any]:
    file = pq.ParquetFile(
        path,
        buffer_size=_BUFFER_BYTES,
        pre_buffer=False,
        thrift_string_size_limit=_MAX_METADATA_BYTES,
        thrift_container_size_limit=1_000_000,
    )
    names = file.schema_arrow.names
    read = [name for name in names if name in used]
    _rows[:] = [_read(file, read)]
    return {"read": read, "unread": [name for name in names if name not in used]}


def _read(file: pq.ParquetFile, columns: list[str]) -> Iterator[bytes]:
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False):
        for row in batch.to_pylist():
            # NaN, which data frames have for a missing text, becomes null. What is neither text nor a value of JSON,
            # such as a date, becomes false, which no form takes for a text.
            yield orjson.dumps(row, default=_no_text, option=orjson.OPT_PASSTHROUGH_DATETIME)


def _no_text(_value: object) -> bool:
    return False


def _next_rows(rows: Iterator[bytes]) -> str:
    taken: list[bytes] = []
    size = 0
    for row in rows:
        taken.append(row)
        size += len(row)
        if size > _ANSWER_BYTES:
            break
    return f"[{b','.join(taken).decode()}]"
