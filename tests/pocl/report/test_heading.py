"""The head of a report names the run, its time and its models."""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

import pytest

from pocl.layout import ABOUT_FILE
from pocl.report.heading import RunName, count_text, describe_models, describe_time, read_run_name

BEGAN = datetime(2026, 11, 5, 22, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "sentence"),
    [
        (0, "5 November 2026, 22:30 to 22:30 UTC (0 seconds)."),
        (119, "5 November 2026, 22:30 to 22:31 UTC (119 seconds)."),
        (330, "5 November 2026, 22:30 to 22:35 UTC (5.5 minutes)."),
        (9000, "5 November 2026, 22:30 to 6 November 2026, 01:00 UTC (2.5 hours)."),
        (-60, "5 November 2026, 22:30 to 22:29 UTC (0 seconds)."),
    ],
)
def test_the_time_of_a_run_is_one_sentence(seconds: int, sentence: str) -> None:
    # Another zone of the machine changes nothing.
    ended = (BEGAN + timedelta(seconds=seconds)).astimezone(timezone(timedelta(hours=5)))
    assert describe_time(RunName(name="first", began_at=BEGAN), ended) == sentence
    named = RunName(name="first", job="job_1", began_at=BEGAN)
    assert describe_time(named, ended) == f"job_1, {sentence}"


@pytest.mark.parametrize(
    ("teacher", "student", "parameters", "sentence"),
    [
        (
            {"kind": "path", "name": "smollm2-135m-instruct"},
            {"kind": "from_teacher", "name": "smollm2-135m-instruct", "layers": "0,1,29"},
            {"teacher": 134_515_008, "student": 39_000_000},
            "Teacher: smollm2-135m-instruct, 134.5 million parameters."
            " Student: 3 layers of the teacher, 39.0 million parameters.",
        ),
        (
            None,
            {"kind": "hub", "name": "acme/base"},
            {"student": 7_615_616_512},
            "Student: acme/base, 7.6 billion parameters.",
        ),
        (
            {"kind": "random", "name": "llama"},
            {"kind": "from_teacher", "name": "llama", "layers": "0"},
            {},
            "Teacher: llama with random weights. Student: 1 layer of the teacher.",
        ),
    ],
)
def test_models_are_named_with_their_sizes(
    teacher: dict[str, str | None] | None,
    student: dict[str, str | None],
    parameters: dict[Literal["teacher", "student"], int],
    sentence: str,
) -> None:
    assert describe_models(teacher, student, parameters) == sentence


@pytest.mark.parametrize(("count", "text"), [(999, "999"), (13_042, "13,042"), (10**6, "1.0 million")])
def test_counts_are_for_people(count: int, text: str) -> None:
    assert count_text(count) == text


@pytest.mark.parametrize(
    "content", [None, b"", b"[]", b'{"name": "x"}', b'{"name": "", "began_at": "2026-11-05T22:30:00Z"}']
)
def test_what_names_no_run_is_left_out(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / ABOUT_FILE).write_bytes(content)
    assert read_run_name(tmp_path) is None
