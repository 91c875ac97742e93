"""A data file is stored by a limited process exactly as it is stored without one."""

import errno
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl.errors import DatasetInvalid
from pocl.samples.limited_storing import SampleStorer, StoringCancelled
from pocl.samples.reading import ReadReport, store_samples
from pocl.spec import ReadOptions

ROWS = [{"instruction": f"Count to {n}.", "output": f"One to {n}.", "source": "mine"} for n in range(20)]


def in_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def in_compressed_parquet(path: Path) -> None:
    # It is unpacked to a file of its own first.
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    path.write_bytes(gzip.compress(sink.getvalue().to_pybytes()))


def with_bad_rows(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n{}\n" for row in ROWS))


def in_damaged_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"{" * 1000)[:-9])


@pytest.mark.system
@pytest.mark.parametrize("write", [in_jsonl, in_compressed_parquet, with_bad_rows, in_damaged_gzip])
def test_file_is_stored_and_refused_as_without_a_process(tmp_path: Path, write: Callable[[Path], None]) -> None:
    source = tmp_path / "rows"
    write(source)
    outcomes: list[object] = []
    target = tmp_path / "stored"
    stores: list[Callable[[], ReadReport]] = [
        lambda: store_samples(source, target, ReadOptions()),
        lambda: SampleStorer(source, small_bytes=0).store(target, ReadOptions()),
    ]
    for store in stores:
        target.write_bytes(b"")
        try:
            outcomes.append((store(), target.read_bytes()))
        except DatasetInvalid as error:
            outcomes.append((type(error), error.message, error.summary, error.field_errors))
    assert outcomes[0] == outcomes[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows", "stored"]


@pytest.mark.system
def test_cancelled_storing_ends_also_where_it_had_not_begun(tmp_path: Path) -> None:
    in_jsonl(tmp_path / "rows")
    storer = SampleStorer(tmp_path / "rows", small_bytes=0)
    storer.cancel()
    with pytest.raises(StoringCancelled):
        storer.store(tmp_path / "stored", ReadOptions())
    assert not (tmp_path / "stored").exists()


@pytest.mark.system
def test_file_that_cannot_be_written_is_told_as_such(tmp_path: Path) -> None:
    in_jsonl(tmp_path / "rows")
    (tmp_path / "stored").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        SampleStorer(tmp_path / "rows", small_bytes=0).store(tmp_path / "stored", ReadOptions())
    assert raised.value.errno == errno.EISDIR
