"""The formats of data files: JSONL, JSON, CSV and Parquet, each also compressed with gzip; told from the content."""

import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from typing_extensions import Buffer

from pocl.errors import DatasetInvalid
from pocl.samples.csv_rows import known_names, read_csv
from pocl.samples.json_values import split_values
from pocl.samples.parquet_rows import ParquetRows
from pocl.samples.row_invalid import RowInvalid
from pocl.samples.strict_json import parse_strict
from pocl.samples.values import Fields
from pocl.spec import ROW_FIELDS, FileFormat, ReadOptions

MAX_ROW_BYTES: Final = 1 << 20
"""The longest row of a file that people send."""
_BOM: Final = b"\xef\xbb\xbf"
_GZIP: Final = b"\x1f\x8b"
_PARQUET: Final = b"PAR1"
_HEAD_BYTES: Final = MAX_ROW_BYTES
_HEADER_BYTES: Final = 1 << 14
_MAX_EXPANSION: Final = 200
"""How many times its size a compressed file may expand to: text shrinks to a fifth, equal rows to a hundredth."""
_FREE_EXPANSION: Final = 64 << 20
_UNUSABLE: Final[Mapping[bytes, str]] = {
    b"\xff\xfe": "The file is UTF-16: save it as UTF-8.",
    b"\xfe\xff": "The file is UTF-16: save it as UTF-8.",
    b"PK\x03\x04": "The file is a ZIP archive or a workbook of Excel: send CSV, JSONL or Parquet, alone or in gzip.",
    b"\x28\xb5\x2f\xfd": "The file is compressed with zstd: use gzip, or send it as it is.",
    b"BZh": "The file is compressed with bzip2: use gzip, or send it as it is.",
    b"\xfd7zXZ": "The file is compressed with xz: use gzip, or send it as it is.",
    b"ARROW1": "The file is Arrow or Feather: write it as Parquet.",
    _GZIP: "The file is compressed with gzip twice: send it compressed once.",
}
_EXTENSIONS: Final[Mapping[str, FileFormat]] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class RowSource:
    """The rows of an open file."""

    format: FileFormat
    compressed: bool
    rows: Iterator[tuple[int, Fields | RowInvalid]]
    """With the number of each, counted from 1: of its line, or of the row where a row is not on lines of its own."""
    unread_columns: Sequence[str] = ()
    """Columns that no form has, and that are not read."""

    @property
    def unit(self) -> str:
        """What the numbers count."""
        return "line" if self.format in ("jsonl", "csv") else "row"


def is_gzip(path: Path) -> bool:
    """Whether the content of a file begins as gzip does.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(_GZIP)) == _GZIP


def format_of_name(name: str) -> FileFormat | None:
    """The format that the name of a file says, with or without `.gz`."""
    return _EXTENSIONS.get(Path(name.lower().removesuffix(".gz")).suffix)


@contextmanager
def open_rows(
    path: Path, options: ReadOptions, *, hint: FileFormat | None = None, limit: int = MAX_ROW_BYTES, skip: int = 0
) -> Iterator[RowSource]:
    """Open a data file and read its rows.

    Args:
        hint: the format that its name or media type says; the content decides, where it can.
        limit: the most bytes of a row.
        skip: how many lines are passed over, unread; of JSONL alone, where each line is a row.

    Raises:
        DatasetInvalid: it cannot be read at all; also while its rows are read.
    """
    with ExitStack() as resources:
        try:
            file = resources.enter_context(io.BufferedReader(io.FileIO(path), _HEAD_BYTES))
            compressed = file.peek(2).startswith(_GZIP)
            raw = _Expanded(file, path.stat().st_size) if compressed else None
            stream = file if raw is None else io.BufferedReader(raw, _HEAD_BYTES)
            head = stream.peek(_HEAD_BYTES)
        except OSError as error:
            raise DatasetInvalid(f"The data file cannot be read: {error.strerror or 'input/output error'}.") from error
        file_format = options.format or _detect(head, options, hint)
        if file_format == "parquet":
            plain = resources.enter_context(_copy(stream)) if compressed else path
            rows = resources.enter_context(ParquetRows(plain, _known(options)))
            yield _parquet_rows(rows, compressed=compressed)
        else:
            unusable = next((sentence for magic, sentence in _UNUSABLE.items() if head.startswith(magic)), None)
            if unusable is not None:
                raise DatasetInvalid(unusable)
            yield RowSource(file_format, compressed, _text_rows(stream, file_format, options, limit, skip))


def parse_line(line: bytes, limit: int = MAX_ROW_BYTES) -> Fields:
    """The row of one line, with or without its line end.

    Raises:
        RowInvalid: the line is no JSON object.
    """
    if len(line.rstrip(b"\r\n")) > limit:
        raise _too_long(limit)
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise RowInvalid("not_utf8", "The line is not UTF-8: save the file as UTF-8.") from None
    row = parse_strict(text)
    if not isinstance(row, dict):
        raise RowInvalid("not_an_object", "The row is not a JSON object.")
    return row


def _detect(head: bytes, options: ReadOptions, hint: FileFormat | None) -> FileFormat:
    if head.startswith(_PARQUET):
        return "parquet"
    text = head.removeprefix(_BOM).lstrip()
    if text.startswith(b"["):
        return "json"
    if text.startswith(b"{"):
        first, _, rest = text.partition(b"\n")
        # Objects that are written over several lines, or whose lines end as on an old Macintosh.
        is_laid_out = first.strip() == b"{" or (b"\r" in first.rstrip() and not rest.strip())
        return "json" if is_laid_out else "jsonl"
    if hint == "csv" or (hint != "json" and known_names(_first_line(text), _known(options))):
        return "csv"
    return "jsonl"


def _first_line(text: bytes) -> str:
    """The first line, as far as a header may be long."""
    return text[:_HEADER_BYTES].replace(b"\r", b"\n").partition(b"\n")[0].decode("utf-8", "replace")


def _known(options: ReadOptions) -> frozenset[str]:
    return frozenset({*ROW_FIELDS, *options.columns.values()})


def _text_rows(
    stream: "io.BufferedReader[Any]", file_format: FileFormat, options: ReadOptions, limit: int, skip: int
) -> Iterator[tuple[int, Fields | RowInvalid]]:
    if file_format == "csv":
        return read_csv(stream, delimiter=options.delimiter, known=_known(options), limit=limit)
    if file_format == "json":
        return _json_rows(stream, limit)
    return _jsonl_rows(stream, limit, skip)


def _jsonl_rows(stream: "io.BufferedReader[Any]", limit: int, skip: int) -> Iterator[tuple[int, Fields | RowInvalid]]:
    """The rows of lines that are not blank. One line is in memory at a time, of one beyond the limit its beginning."""
    number = _pass_over_lines(stream, skip)
    most = len(_BOM) + limit + len(b"\r\n")
    while line := stream.readline(most):
        number += 1
        if len(line) == most and not line.endswith(b"\n"):
            while (rest := stream.readline(limit)) and not rest.endswith(b"\n"):
                pass
            yield number, _too_long(limit)
            continue
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield number, _row_or_error(line, limit)


def _pass_over_lines(stream: "io.BufferedReader[Any]", lines: int) -> int:
    """Go to behind so many line ends, by looking for these alone; how many there were."""
    passed = 0
    while passed < lines and (block := stream.peek(_HEAD_BYTES)):
        here = block.count(b"\n")
        if passed + here < lines:
            passed += here
            stop = len(block)
        else:
            stop = 0
            for _ in range(lines - passed):
                stop = block.index(b"\n", stop) + 1
            passed = lines
        stream.read(stop)
    return passed


def _json_rows(stream: BinaryIO, limit: int) -> Iterator[tuple[int, Fields | RowInvalid]]:
    for number, value in enumerate(split_values(stream, limit), start=1):
        yield number, _too_long(limit) if value is None else _row_or_error(value, limit)


def _parquet_rows(rows: ParquetRows, *, compressed: bool) -> RowSource:
    if not rows.read:
        listed = ", ".join(repr(name[:40]) for name in rows.unread[:8])
        raise DatasetInvalid(f"The file has the columns {listed}, of no known form: map them with `columns`.")
    return RowSource("parquet", compressed, iter(rows), rows.unread)


def _row_or_error(text: bytes, limit: int) -> Fields | RowInvalid:
    try:
        return parse_line(text, limit)
    except RowInvalid as error:
        return error


def _too_long(limit: int) -> RowInvalid:
    return RowInvalid("line_too_long", f"The row has more than {limit} bytes.")


class _Expanded(io.RawIOBase):
    """What a gzip file expands to, up to a bound."""

    def __init__(self, file: BinaryIO, compressed_bytes: int) -> None:
        self._gzip = gzip.GzipFile(fileobj=file, mode="rb")
        self._left = _FREE_EXPANSION + _MAX_EXPANSION * compressed_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer)
        try:
            content = self._gzip.read(len(view))
        except (OSError, EOFError, zlib.error) as error:
            raise DatasetInvalid("The gzip file is damaged, or breaks off: send it again, whole.") from error
        self._left -= len(content)
        if self._left < 0:
            raise DatasetInvalid(f"The gzip file expands to more than {_MAX_EXPANSION} times its size.")
        view[: len(content)] = content
        return len(content)


@contextmanager
def _copy(stream: BinaryIO) -> Iterator[Path]:
    """The content as a file of its own, for a format that is not read from front to back."""
    with tempfile.NamedTemporaryFile() as plain:
        shutil.copyfileobj(stream, plain, 1 << 20)
        plain.flush()
        yield Path(plain.name)
