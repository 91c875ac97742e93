"""How many samples, and how long, a plan takes a run to have of each set."""

from typing import Any

from domain.jobs.data_checks import DataFigures, StoredRows, set_sizes
from pocl.encoding_counts import EncodingCounts
from pocl.estimate import SetSize
from pocl.spec import resolve


def sizes(data: dict[str, Any], rows: dict[str, int], samples: int, *counted: DataFigures) -> dict[str, SetSize]:
    spec = resolve(
        {
            "teacher": {"random": {}},
            "student": {"random": {}},
            "data": {"max_length": 100, "max_prompt_length": 60, "train": {"path": "a"}, **data},
            "evaluation": {"max_rows": 8},
        }
    )
    stored = {
        f"/{'evaluation/sets' if name == 'mine' else 'data'}/{name}": StoredRows(None, rows[name]) for name in rows
    }
    return set_sizes(spec, samples, stored, counted)


def figures(part: str, samples: int, tried: int) -> DataFigures:
    counts = EncodingCounts(rows=tried, tokens=50 * tried, prompt_tokens=30 * tried, trained_tokens=15 * tried)
    return DataFigures(part, "chat", samples, tried, counts)


def test_samples_that_were_not_tried_are_like_those_that_were_and_of_full_length_before_any_was() -> None:
    rows = {"train": 40, "validation": 20, "mine": 5}
    result = sizes({}, rows, 40, figures("train", 40, 4), figures("mine", 5, 0))
    assert result == {
        "train": SetSize(40, 2000, 1200, 600),
        # As many as are evaluated on.
        "validation": SetSize(8, 800, 480, 320),
        "mine": SetSize(5, 500, 300, 200),
    }


def test_parts_of_a_split_are_as_large_as_the_samples_that_are_left_say() -> None:
    split = {"split": {"validation": 0.1, "test": 0.2}}
    result = sizes(split, {"train": 100}, 73, figures("train", 100, 100))
    assert {part: size.samples for part, size in result.items()} == {"train": 73, "validation": 8, "test": 18}
    assert {size.length for size in result.values()} == {50}
