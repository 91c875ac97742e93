"""Pages of a preview: the same rows however they are divided, and rows before a page are not looked at."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl.errors import DatasetInvalid
from pocl.preview.encoder import EncodingInputs, PreviewRow
from pocl.samples.sample import Message, Sample
from pocl.samples.splits import part_of
from pocl.samples.stored import STORED, stored_line
from pocl.spec import Data, RandomModel
from tests.support.encoders import open_encoder

SAMPLES = [
    # Only a newline of the file ends a line: those of the texts are escaped, and other separators are text.
    Sample((Message("user", f"{number}\u2028?\n"), Message("assistant", "So.\r\n\x85" * (number % 3 + 1))))
    for number in range(23)
]


@contextmanager
def stored(content: bytes, **more: Any) -> Iterator[EncodingInputs]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "samples.jsonl"
        path.write_bytes(content)
        # Its prompt needs no process that renders templates.
        data = Data.model_validate({"train": {"path": str(path), **STORED.model_dump()}, "template": "alpaca", **more})
        yield EncodingInputs(data, RandomModel())


def page(inputs: EncodingInputs, offset: int, rows: int) -> list[PreviewRow]:
    with open_encoder(inputs) as encoder:
        return encoder.preview(skip=offset, rows=rows).rows


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.data())
def test_pages_show_the_same_rows_however_they_are_divided(sizes: list[int], data: st.DataObject) -> None:
    with stored(b"".join(map(stored_line, SAMPLES))) as inputs:
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        order = data.draw(st.permutations(range(len(sizes))))
        pages = {index: page(inputs, starts[index], sizes[index]) for index in order}
        rows = [row for index in range(len(sizes)) for row in pages[index]]
    expected = SAMPLES[: sum(sizes)]
    assert [(row.row, row.digest) for row in rows] == [(n, sample.digest) for n, sample in enumerate(expected)]


def test_rows_before_a_page_are_not_looked_at_and_one_of_the_page_is_named_by_its_line() -> None:
    lines = [stored_line(sample) for sample in SAMPLES]
    # Nothing that could be read stands before the page, and more than is read at once.
    lines[:10] = [b"x" * 300_000 + b"\n"] * 10
    with stored(b"".join(lines)) as inputs:
        assert [row.digest for row in page(inputs, 10, 2)] == [sample.digest for sample in SAMPLES[10:12]]
        assert page(inputs, 23, 5) == page(inputs, 10**9, 5) == []
    lines[20] = b"{}\n"
    with stored(b"".join(lines)) as inputs, pytest.raises(DatasetInvalid) as refused:
        page(inputs, 19, 4)
    assert [each.pointer for each in refused.value.field_errors] == ["/lines/21"]


@pytest.mark.parametrize("skip", [1, 7, 22])
def test_count_goes_on_in_another_process_with_what_it_counted(skip: int) -> None:
    split: Any = {"validation": 0.3, "test": 0.2, "seed": 1}
    with stored(b"".join(map(stored_line, SAMPLES)), split=split) as inputs, open_encoder(inputs) as encoder:
        whole = encoder.count(skip=0, parts={}, seconds=60)
    assert (whole.done, sum(whole.parts.values()), whole.training_samples) == (True, 23, whole.parts["train"])
    before = Counter[str](part_of(sample, **split) for sample in SAMPLES[:skip])
    unread = b"x\n" * skip + b"".join(map(stored_line, SAMPLES[skip:]))
    with stored(unread, split=split) as inputs, open_encoder(inputs) as encoder:
        rest = encoder.count(skip=skip, parts=before, seconds=60)
    assert (rest.done, rest.rows, rest.parts, rest.training_samples) == (
        (True, 23 - skip, whole.parts, whole.training_samples)
    )
