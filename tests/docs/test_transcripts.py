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
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # The examples are scripts, which import each other as a directory of scripts does.
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("demo")


def printed_evaluations() -> tuple[list[dict[str, Any]], int]:
    """The evaluations of the demo's table as a result has them, and the stage that is marked as the best."""
    table = re.findall(
        r"^(teacher|untrained student|after stage (\d)|final student) +([\d.]+) +([\d.]+)(  best.*)?$", TEXT, re.M
    )
    subjects = {"teacher": "teacher", "untrained student": "initial", "final student": "final"}
    evaluations = [
        {
            "subject": subjects.get(name, "stage"),
            "stage": int(stage) - 1 if stage else None,
            "rouge_l": float(rouge),
            "cross_entropy": float(cross_entropy),
            "rows": 64,
        }
        for name, stage, rouge, cross_entropy, _ in table
    ]
    (best,) = (int(stage) - 1 for _, stage, _, _, mark in table if mark)
    return evaluations, best


def test_readme_shows_the_ready_message_of_serve() -> None:
    home = Path("/home/you/pocl-service/.pocl")
    message = ready_message(Settings(home=home), 8000, [home / "logs" / name for name in LOGS])
    # The reader of the README has the model by then.
    assert re.sub(r"   \(none yet.*\)", "", message) in TEXT


def test_readme_shows_what_the_demo_prints_of_its_scores(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    evaluations, best_stage = printed_evaluations()
    demo.print_scores(evaluations, best_stage)
    assert demo.check_gains(evaluations) == 0
    table, gains = capsys.readouterr().out.strip().split("untrained to", 1)
    assert table in TEXT
    assert f"untrained to{gains}" in TEXT


@pytest.mark.parametrize("change", [{"rouge_l": 2.0}, {"cross_entropy": 7.5}, {"rows": 63}], ids=str)
def test_demo_fails_where_a_threshold_is_missed(
    demo: ModuleType, capsys: pytest.CaptureFixture[str], change: dict[str, float]
) -> None:
    evaluations, _ = printed_evaluations()
    final = evaluations.pop()
    assert demo.check_gains([*evaluations, {**final, **change}]) == 1
    assert ": FAILED\n" in capsys.readouterr().out
