"""Formats of data files: the same samples from each, compressed or not, told by content, bounded in memory."""

import codecs
import csv
import gzip
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.errors import DatasetInvalid
from pocl.samples.file_formats import MAX_ROW_BYTES, format_of_name
from pocl.samples.json_values import split_values
from pocl.samples.reading import read_sample_file, read_samples, store_samples
from pocl.samples.sample import Sample
from pocl.spec import ReadOptions

Row = dict[str, Any]
ROWS: list[Row] = [
    {"instruction": 'Why,\n"really"?', "input": "Ünï 👩‍🔬", "output": "So.", "category": "open"},
    {"instruction": "Who; me?", "input": None, "output": "You|I\tdo.", "category": None},
]


def in_jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def in_json(rows: list[Row]) -> bytes:
    return json.dumps(rows).encode()


def in_pretty_json(rows: list[Row]) -> bytes:
    return json.dumps(rows, indent=2).encode()


def in_objects_over_lines(rows: list[Row]) -> bytes:
    return "\n".join(json.dumps(row, indent=1) for row in rows).encode()


def in_lines_that_end_with_cr(rows: list[Row]) -> bytes:
    return in_jsonl(rows).replace(b"\n", b"\r")


def in_csv(rows: list[Row], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def in_tsv(rows: list[Row]) -> bytes:
    return in_csv(rows, "\t")


def in_csv_with_semicolons(rows: list[Row]) -> bytes:
    return in_csv(rows, ";")


def in_parquet(rows: list[Row]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


TEXT_WRITERS = (
    *(in_jsonl, in_json, in_pretty_json, in_objects_over_lines, in_lines_that_end_with_cr),
    *(in_csv, in_tsv, in_csv_with_semicolons),
)


def read(path: Path, content: bytes, **options: Any) -> list[Sample]:
    path.write_bytes(content)
    return read_samples(path, ReadOptions(**options))


@pytest.mark.parametrize("write", TEXT_WRITERS)
def test_every_format_gives_the_same_samples_also_compressed(
    write: Callable[[list[Row]], bytes], tmp_path: Path
) -> None:
    expected = read(tmp_path / "rows", in_jsonl(ROWS))
    assert [sample.conversation[0].content for sample in expected] == [row["instruction"] for row in ROWS]
    plain = write(ROWS).removeprefix(codecs.BOM_UTF8)
    for content in (plain, codecs.BOM_UTF8 + plain, gzip.compress(plain), gzip.compress(codecs.BOM_UTF8 + plain)):
        (tmp_path / "rows").write_bytes(content)
        samples, report = read_sample_file(tmp_path / "rows")
        assert samples == expected
        assert (report.rows, dict(report.ignored), report.bad) == (2, {"category": 1}, 0)
        assert report.compressed == (content[:2] == b"\x1f\x8b")


@pytest.mark.system
def test_parquet_gives_the_same_samples_also_compressed(tmp_path: Path) -> None:
    expected = read(tmp_path / "rows", in_jsonl(ROWS))
    for content in (in_parquet(ROWS), gzip.compress(in_parquet(ROWS))):
        (tmp_path / "rows").write_bytes(content)
        samples, report = read_sample_file(tmp_path / "rows")
        assert samples == expected
        # Columns that no form has are not read, so that nothing is known of what is empty in them.
        assert (report.format, dict(report.ignored)) == ("parquet", {"category": 2})


@pytest.mark.system
def test_parquet_with_nested_messages_and_odd_values(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "sky", "arguments": '{"at":"noon"}'}}
    messages = [
        {"role": "user", "content": "Sky?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": "blue", "tool_calls": None},
    ]
    (expected,) = read(tmp_path / "rows", in_jsonl([{"messages": messages}]))
    assert read(tmp_path / "rows", in_parquet([{"messages": messages}])) == [expected]
    # A data frame writes NaN where no text is.
    nan = pa.table({"instruction": ["a"], "input": [float("nan")], "output": ["b"]})
    pq.write_table(nan, tmp_path / "rows")
    assert [sample.context for sample in read_samples(tmp_path / "rows")] == [""]
    pq.write_table(pa.table({"instruction": ["a", "a"], "output": [b"\xff", b"b"]}), tmp_path / "rows")
    with pytest.raises(DatasetInvalid, match=r"2 of 2 rows .* row 1: output is not a string"):
        read_samples(tmp_path / "rows")
    pq.write_table(pa.table({"question_text": ["a"], "best": ["b"]}), tmp_path / "rows")
    with pytest.raises(DatasetInvalid, match="'question_text', 'best'"):
        read_samples(tmp_path / "rows")
    mapped = ReadOptions(columns={"instruction": "question_text", "output": "best"})
    assert len(read_samples(tmp_path / "rows", mapped)) == 1


@pytest.mark.system
def test_parquet_values_without_a_place_in_json_are_not_trained_on_as_others(tmp_path: Path) -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)

    def row(arguments: Row, **more: Any) -> Row:
        call = {"function": {"name": "sky", "arguments": arguments}}
        answer = {"role": "assistant", "tool_calls": [call], "at": at}
        return {"messages": [{"role": "user", "content": "?"}, answer], **more}

    # Structs have all fields that any row has: null there is what is absent.
    good = [row({"a": 1, "n": Decimal("1.5")}), row({"b": "2"}, difficulty=Decimal("0.25")), row({"c": float("nan")})]
    odd = [date(2026, 1, 2), timedelta(1), b"x", float("inf"), [{"at": at}]]
    bad = [row({f"odd{index}": value}) for index, value in enumerate(odd)]
    bad.append(row({"b": "2"}, tools=[{"name": "f", "since": date.min}]))
    # The first row has all columns, from which the schema is taken.
    columns = {"messages": None, "difficulty": None, "tools": None}
    (tmp_path / "rows").write_bytes(in_parquet([columns | each for each in (*good, *bad)]))
    samples, report = read_sample_file(tmp_path / "rows", ReadOptions(on_bad_rows="skip"))
    arguments = [sample.conversation[-1].tool_calls[0].arguments for sample in samples]
    assert arguments == ['{"a":1,"n":1.5}', '{"b":"2"}', "{}"]
    assert [sample.difficulty for sample in samples] == [None, 0.25, None]
    assert report.ignored["messages[].at"] == 3
    where = [*["messages[1].tool_calls[0].arguments"] * 5, "tools"]
    assert [(each.pointer, each.code, each.detail.split(" ")[0]) for each in report.bad_rows] == [
        (f"/rows/{number}", "wrong_type", place) for number, place in enumerate(where, start=4)
    ]


@pytest.mark.system
def test_parquet_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    arrays = [pa.array([text]) for text in "abc"]
    for names, match in ((["instruction", "output", "output"], "'output' twice"), (["instruction", "x", "x"], None)):
        pq.write_table(pa.Table.from_arrays(arrays, names=names), tmp_path / "rows")
        if match is None:
            assert len(read_samples(tmp_path / "rows")) == 1
        else:
            with pytest.raises(DatasetInvalid, match=match):
                read_samples(tmp_path / "rows")


@pytest.mark.system
def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    whole = in_parquet([{"instruction": f"{n} " * 50, "output": "b"} for n in range(500)])
    for content in (whole[:-20], b"PAR1" + b"x" * 100 + b"PAR1", whole[:200] + b"\xff" * 500 + whole[700:]):
        with pytest.raises(DatasetInvalid, match="damaged"):
            read(tmp_path / "rows", content)


REFUSED = {
    "UTF-16": (in_jsonl(ROWS).decode().encode("utf-16"), "save it as UTF-8"),
    "a ZIP archive": (b"PK\x03\x04" + bytes(50), "ZIP"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(50), "zstd"),
    "Arrow": (b"ARROW1" + bytes(50), "Parquet"),
    "gzip twice": (gzip.compress(gzip.compress(in_jsonl(ROWS))), "twice"),
    "half a gzip": (gzip.compress(in_jsonl(ROWS * 100))[:-30], "gzip file is damaged"),
    "a gzip that expands without end": (gzip.compress((b" " * 4095 + b"\n") * (24 << 10)), "200 times"),
    "an array that breaks off": (in_json(ROWS)[:-10], "breaks off"),
    "an array that nests without end": (b"[" * 100_000, "nested"),
    "an array and more": (in_json(ROWS) + b"{}", "follows"),
    "a comma too many": (b'[{"instruction": "a", "output": "b"},]', "row 2"),
    "rows in an object": (json.dumps({"data": ROWS}).encode(), "send the list alone"),
    "a header twice": (b"instruction,output,output\na,b,c\n", "twice"),
    "a row of more fields": (b"instruction,output\na,b,c\n", "3 fields"),
    "a row of fewer fields": (b"instruction,output\na\n", "1 fields"),
    "a quote in a field": (b'instruction,output\n"a"b,c\n', "not CSV"),
    "Latin-1": ("instruction,output\na,café\n".encode("latin-1"), "line 2: The row is not UTF-8"),
    "columns of another file": (b"instruction,output\na,b\n", "No row has the column 'answer'"),
}


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_unusable_file_is_refused_with_what_to_do(content: bytes, words: str, tmp_path: Path) -> None:
    options = {"columns": {"history": "answer"}} if "answer" in words else {}
    with pytest.raises(DatasetInvalid, match=words):
        read(tmp_path / "rows", content, **options)


def test_format_and_delimiter_may_be_given(tmp_path: Path) -> None:
    content = b"q~a\nWhy?~So.\n"
    options = {"format": "csv", "delimiter": "~", "columns": {"instruction": "q", "output": "a"}}
    assert len(read(tmp_path / "rows", content, **options)) == 1
    with pytest.raises(DatasetInvalid, match="not strict JSON"):
        read(tmp_path / "rows", content)
    (tmp_path / "rows").write_bytes(content.replace(b"~", b";"))
    assert len(read_sample_file(tmp_path / "rows", ReadOptions(columns=options["columns"]))[0]) == 1
    assert [format_of_name(name) for name in ("a.CSV", "b.json.gz", "c.txt", "")] == ["csv", "json", None, None]


def test_csv_holds_an_index_of_a_data_frame_and_bad_rows_of_their_own(tmp_path: Path) -> None:
    content = b',instruction,output\n0,a,b\n1,"x\ny",\n2,"not closed,c\n3,d,e\n'
    (tmp_path / "rows").write_bytes(content)
    samples, report = read_sample_file(tmp_path / "rows", ReadOptions(on_bad_rows="skip"))
    assert len(samples) == 1
    assert dict(report.ignored) == {"(unnamed column 1)": 1}
    assert [(error.pointer, error.code) for error in report.bad_rows] == [
        ("/lines/3", "missing"),
        ("/lines/5", "not_csv"),
    ]


def test_unclosed_quote_of_a_large_file_takes_bounded_memory_and_few_rows(tmp_path: Path) -> None:
    row = f"{'a' * 2000},b\n"
    content = 'instruction,output\n"open,b\n' + row * (2 * MAX_ROW_BYTES // len(row))
    (tmp_path / "rows").write_text(content)
    samples, report = read_sample_file(tmp_path / "rows", ReadOptions(on_bad_rows="skip"))
    assert report.bad == 1
    assert len(samples) == pytest.approx(MAX_ROW_BYTES // len(row), abs=2)


values = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), values, max_size=4)


class InPieces(io.BytesIO):
    """Gives few bytes at each read."""

    def __init__(self, content: bytes, size: int) -> None:
        super().__init__(content)
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(self._size, size or 0) if size and size > 0 else self._size)


@given(st.lists(objects, max_size=4), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9))
def test_json_values_are_told_apart_wherever_the_file_is_cut(
    listed: list[Row], indent: int | None, is_array: bool, size: int
) -> None:
    texts = [json.dumps(each, indent=indent) for each in listed]
    content = f" [ {' , '.join(texts)} ] " if is_array else "\n".join(texts)
    pieces = list(split_values(InPieces(content.encode(), size), 1 << 20))
    assert [json.loads(piece or b"") for piece in pieces] == listed


def test_long_json_value_is_named_and_the_next_one_read() -> None:
    content = json.dumps([{"a": "x" * 100}, {"b": 1}]).encode()
    assert list(split_values(io.BytesIO(content), 50)) == [None, b'{"b": 1}']


def test_mixed_prompts_and_answers_are_refused_or_the_prompts_skipped(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": "Why?"}, {"prompt": "Why?", "completion": "So."}, {"nothing": 1}]
    with pytest.raises(DatasetInvalid, match=r"2 of 3 rows .* line 1: The row has no answer.*line 3"):
        read(tmp_path / "rows", in_jsonl(rows))
    options = ReadOptions(on_bad_rows="skip")
    samples, report = read_sample_file(tmp_path / "rows", options)
    assert [sample.references for sample in samples] == [("So.",)]
    assert (report.rows, report.prompts, report.bad, dict(report.forms)) == (1, 0, 2, {"prompt_completion": 1})
    store_samples(tmp_path / "rows", tmp_path / "stored", options)
    assert read_samples(tmp_path / "stored") == samples
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["rows", "stored"]
    # A file of prompts alone is whole.
    alone, report = read_sample_file(tmp_path / "rows", ReadOptions(form="prompt_only", on_bad_rows="skip"))
    assert (len(alone), report.prompts) == (2, 2)


_PEAK_MEMORY = """
import resource, sys
from pathlib import Path
from pocl.samples.reading import store_samples
from pocl.spec import ReadOptions
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = store_samples(Path(sys.argv[1]), Path(sys.argv[2]), ReadOptions())
own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(report.rows, own // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.system
def test_large_parquet_of_one_row_group_takes_constant_memory(tmp_path: Path) -> None:
    rows, columns = 30_000, {}
    for name in ("instruction", "output", "unused"):
        columns[name] = [f"{name} {n} {random.Random(n).randbytes(1000).hex()}" for n in range(rows)]
    pq.write_table(pa.table(columns), tmp_path / "rows", row_group_size=rows, use_dictionary=False)
    assert (tmp_path / "rows").stat().st_size > 150 << 20
    command = [sys.executable, "-c", _PEAK_MEMORY, str(tmp_path / "rows"), str(tmp_path / "stored")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    read, own_mib, decoder_mib = map(int, printed.split())
    # The decoder's imports alone take some 80 MiB. Of a file of 1 GB no more is in memory than of this one.
    assert (read, own_mib < 32, decoder_mib < 160) == (rows, True, True), printed
