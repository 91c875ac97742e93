"""The difficulty of a row is a number, and nothing else that stands in its column."""

from typing import Any

import pytest

from pocl.samples.difficulty import difficulty_of
from pocl.samples.sample import Message, Sample


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3.0), (0.5, 0.5), ("2.5", 2.5), (-1, -1.0), ("hard", None), (True, None), (None, None), ("", None),
     ("nan", None), (float("inf"), None), (10**400, None), ([1], None)],
)  # fmt: skip
def test_number_or_its_text_is_a_difficulty(value: object, expected: float | None) -> None:
    assert difficulty_of({"difficulty": value}) == expected


def test_difficulty_is_a_part_of_the_sample_and_its_digest_where_there_is_one() -> None:
    def digest(**fields: Any) -> str:
        return Sample((Message("user", "q"), Message("assistant", "a")), **fields).digest

    assert digest() == digest(difficulty=None) != digest(difficulty=1.0) != digest(difficulty=2.0)
