"""The transcripts in the README are what the programs print."""

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from domain.settings import Settings
from tests.docs.blocks import README
from tests.support.compose_file import ROOT
from worker.embedded import ready_message

TEXT = README.read_text(encoding="utf-8")
LOGS = ("broker.log", "api.log", "scheduler.log", "worker.log")


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # The examples are scripts, which import each other as a directory of scripts does.
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("demo_output")


def evaluation(subject: str, stage: str, rouge: str, cross_entropy: str) -> dict[str, Any]:
    return {
        "subject": subject,
        "stage": int(stage) - 1 if stage else None,
        "rouge_l": float(rouge),
        "cross_entropy": float(cross_entropy),
        "rows": 64,
    }


def printed_evaluations() -> tuple[list[dict[str, Any]], int, list[dict[str, Any]]]:
    """The evaluations of the demo's table as a result has them, the stage that is marked as the best, and those of the
    control.
    """
    numbers = r" +([\d.]+) +([\d.]+)"
    table = re.findall(rf"^(teacher|untrained student|after stage (\d)|final student){numbers}(  best.*)?$", TEXT, re.M)
    subjects = {"teacher": "teacher", "untrained student": "initial", "final student": "final"}
    evaluations = [
        evaluation(subjects.get(name, "stage"), stage, rouge, cross_entropy)
        for name, stage, rouge, cross_entropy, _ in table
    ]
    (best,) = (int(stage) - 1 for _, stage, _, _, mark in table if mark)
    ((rouge, cross_entropy),) = re.findall(rf"^control{numbers}  as many steps", TEXT, re.M)
    return evaluations, best, [evaluation("final", "", rouge, cross_entropy)]


def test_readme_shows_the_ready_message_of_serve() -> None:
    home = Path("/home/you/pocl-service/.pocl")
    message = ready_message(Settings(home=home), 8000, [home / "logs" / name for name in LOGS])
    # The reader of the README has the model by then.
    assert re.sub(r"   \(none yet.*\)", "", message) in TEXT


def test_readme_shows_what_the_demo_prints_of_its_scores(
    output: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluations, best_stage, control = printed_evaluations()
    output.print_scores(evaluations, best_stage, control)
    assert output.check_gains(evaluations) == 0
    table, gains = capsys.readouterr().out.strip().split("untrained to", 1)
    assert table in TEXT
    assert f"untrained to{gains}" in TEXT


@pytest.mark.parametrize("change", [{"rouge_l": 2.0}, {"cross_entropy": 7.5}, {"rows": 63}], ids=str)
def test_demo_fails_where_a_threshold_is_missed(
    output: ModuleType, capsys: pytest.CaptureFixture[str], change: dict[str, float]
) -> None:
    evaluations, _, _ = printed_evaluations()
    final = evaluations.pop()
    assert output.check_gains([*evaluations, {**final, **change}]) == 1
    assert ": FAILED\n" in capsys.readouterr().out


def test_answers_stand_side_by_side_whole_and_as_they_are(
    output: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a narrow table a long word is parted.
    monkeypatch.setenv("COLUMNS", "160")
    said = {"teacher": "Canberra.", "initial": "a [bold]round[/bold] a", "final": "It is Sydney."}
    output.print_answers([{"prompt": "The capital of Australia?", "reference": "Canberra", "answers": said}])
    printed = capsys.readouterr().out
    words = (text.split() for text in ("The capital of Australia?", "untrained student", *said.values()))
    assert all(word in printed for text in words for word in text)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.0, 3.0, "2.00 points of ROUGE-L above its control (95 % interval +1.00 to +3.00): here it helped"),
        (-3.0, -1.0, "2.00 points of ROUGE-L below its control (95 % interval -3.00 to -1.00): here it did harm"),
        (
            -1.0,
            3.0,
            "1.00 points of ROUGE-L above its control (95 % interval -1.00 to +3.00): here it made no difference",
        ),
    ],
)
def test_what_the_curriculum_brought_is_said_whichever_way_it_fell(
    output: ModuleType, low: float, high: float, words: str
) -> None:
    assert words in output.describe_comparison({"difference": (low + high) / 2, "low": low, "high": high})
