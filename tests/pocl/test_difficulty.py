"""The difficulty of a row is a number, and nothing else that stands in its column."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pocl.samples.difficulty import difficulty_of
from pocl.samples.reading import read_sample_file
from pocl.samples.sample import Message, Sample
from pocl.spec import ReadOptions


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3.0), (0.5, 0.5), ("2.5", 2.5), (-1, -1.0), ("hard", None), (True, None), (None, None), ("", None),
     ("nan", None), (float("inf"), None), (10**400, None), ([1], None), ("1e400", None), (" -.5e1 ", -5.0),
     ("1_000", None), ("\u0663", None), ("0x1", None)],
)  # fmt: skip
def test_number_or_its_text_is_a_difficulty(value: object, expected: float | None) -> None:
    assert difficulty_of({"difficulty": value}) == expected


def test_difficulty_is_a_part_of_the_sample_and_its_digest_where_there_is_one() -> None:
    def digest(**fields: Any) -> str:
        return Sample((Message("user", "q"), Message("assistant", "a")), **fields).digest

    assert digest() == digest(difficulty=None) != digest(difficulty=1.0) != digest(difficulty=2.0)


def test_equal_samples_have_one_digest_whatever_the_sign_of_their_zero() -> None:
    assert [math.copysign(1.0, difficulty_of({"difficulty": zero}) or 0.0) for zero in (0, -0.0, "-0")] == [1.0] * 3


def test_column_that_is_named_as_the_difficulty_has_a_number_in_each_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    values = ["1.5", 2, None, "hard", "", True, [1], 1e308, float("1e-5")]
    rows = [{"instruction": f"{n}?", "output": "So.", "score": value} for n, value in enumerate(values)]
    lines = [*map(json.dumps, rows), '{"instruction": "a", "output": "b"}']
    path.write_text("\n".join(lines))
    options = ReadOptions(columns={"difficulty": "score"}, on_bad_rows="skip")
    samples, report = read_sample_file(path, options)
    assert [sample.difficulty for sample in samples] == [1.5, 2.0, 1e308, 1e-5]
    assert [(each.pointer, each.code) for each in report.bad_rows] == [
        ("/lines/3", "missing"),
        ("/lines/4", "wrong_type"),
        ("/lines/5", "missing"),
        ("/lines/6", "wrong_type"),
        ("/lines/7", "wrong_type"),
        ("/lines/10", "missing"),
    ]
    assert all("score" in each.detail for each in report.bad_rows)
    # Without a mapping it is a column that no form has.
    assert all(sample.difficulty is None for sample in read_sample_file(path)[0])
