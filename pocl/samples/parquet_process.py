"""Decodes a Parquet file a few rows at a time, in a child process with limits (see :mod:`pocl.limited_process`).

The first request names the file and the columns that are used; each further one is for the next rows.
"""

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pocl.samples.strict_json import NO_JSON

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
        array of objects, empty at the end of the file; or `damaged`, true; or `twice`, a used column of which there are
        two.
    """
    try:
        return _open(request["path"], set(request["used"])) if request else {"rows": _next_rows(_rows[0])}
    except _ERRORS:
        return {"damaged": True}


def _open(path: str, used: set[str]) -> dict[str, Any]:
    """
    Raises:
        ValueError: it cannot be read.
    """
    file = pq.ParquetFile(
        path,
        buffer_size=_BUFFER_BYTES,
        pre_buffer=False,
        thrift_string_size_limit=_MAX_METADATA_BYTES,
        thrift_container_size_limit=1_000_000,
    )
    names = file.schema_arrow.names
    read = [name for name in names if name in used]
    if twice := [name for index, name in enumerate(read) if name in read[:index]]:
        return {"twice": twice[0]}
    _rows[:] = [_read(file, read)]
    return {"read": read, "unread": [name for name in names if name not in used]}


def _read(file: pq.ParquetFile, columns: list[str]) -> Iterator[bytes]:
    nested = [name for name in columns if pa.types.is_nested(file.schema_arrow.field(name).type)]
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False):
        for row in batch.to_pylist():
            row |= {name: _value_of_json(row[name]) for name in nested}
            # NaN, which data frames have for a missing text, becomes null. What is neither text nor a value of JSON,
            # such as a date, becomes false, which no form takes for a text.
            yield orjson.dumps(row, default=_no_text, option=orjson.OPT_PASSTHROUGH_DATETIME)


def _no_text(value: object) -> float | bool:
    return float(value) if isinstance(value, Decimal) else False


def _value_of_json(value: object) -> Any:  # Any: values of JSON.
    """A value in structs and lists. All structs of a column have the same fields: those without a value are null, and
    are left out here. What JSON does not have is marked, for tools and arguments are trained on whatever they hold.
    """
    match value:
        case dict():
            return {name: _value_of_json(each) for name, each in value.items() if not _is_missing(each)}
        case list() | tuple():
            return [_value_of_json(each) for each in value]
        case float() if math.isinf(value):
            return NO_JSON
        case None | str() | bool() | int() | float():
            return value
        case Decimal() if value.is_finite():
            return float(value)
        case _:
            return NO_JSON


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _next_rows(rows: Iterator[bytes]) -> str:
    taken: list[bytes] = []
    size = 0
    for row in rows:
        taken.append(row)
        size += len(row)
        if size > _ANSWER_BYTES:
            break
    return f"[{b','.join(taken).decode()}]"
