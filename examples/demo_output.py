"""What the demo prints of its jobs: scores, answers side by side, and the curriculum beside its control."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pocl_client.models import Event

SUBJECTS = {"teacher": "teacher", "initial": "untrained student", "final": "final student"}
COLUMNS = {"reference": "reference", **SUBJECTS}

MIN_CE_GAIN = 0.4
"""Nats by which held-out cross-entropy must fall."""
MIN_ROUGE_GAIN = 3.0
"""Points by which held-out ROUGE-L must rise."""
MIN_SAMPLES = 64


def print_phases(events: Sequence[Event]) -> None:
    """Where the time went."""
    seconds: dict[str, float] = {}
    phase, since = "queued", None
    for event in events:
        if since is not None:
            seconds[phase] = seconds.get(phase, 0) + (event.at - since).total_seconds()
        since = event.at
        if event.type == "phase":
            phase = event.data["phase"]
    print("time      " + ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items() if spent >= 0.5))


def print_scores(
    evaluations: Sequence[Mapping[str, Any]], best_stage: int | None, control: Sequence[Mapping[str, Any]]
) -> None:
    """The held-out scores of every model that was evaluated, with a mark at the best stage; last the control's student.

    Args:
        control: the evaluations of the job without a curriculum.
    """
    print(f"\n{'model':<20}{'ROUGE-L':>9}{'held-out CE':>13}")
    for scores in evaluations:
        is_stage = scores["subject"] == "stage"
        name = f"after stage {scores['stage'] + 1}" if is_stage else SUBJECTS[scores["subject"]]
        mark = "  best by ROUGE-L" if is_stage and scores["stage"] == best_stage else ""
        print(f"{name:<20}{scores['rouge_l']:>9.2f}{scores['cross_entropy']:>13.3f}{mark}")
    final = scores_by_subject(control)["final"]
    print(f"{'control':<20}{final['rouge_l']:>9.2f}{final['cross_entropy']:>13.3f}  as many steps without a curriculum")


def scores_by_subject(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {each["subject"]: each for each in evaluations}


def print_answers(answers: Sequence[Mapping[str, Any]]) -> None:
    """What teacher, untrained and final student answer to the first held-out samples, side by side."""
    table = Table(title="Answers to the first held-out samples", show_lines=True, title_justify="left")
    table.add_column("prompt")
    for name in COLUMNS.values():
        table.add_column(name)
    for each in answers:
        said = {"reference": each["reference"], **each["answers"]}
        table.add_row(each["prompt"], *(str(said.get(column, "")) for column in COLUMNS))
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120"))
    # Of rich's markup there is none in what models say.
    Console(width=width, markup=False, highlight=False).print(table)


def describe_comparison(difference: Mapping[str, Any]) -> str:
    """One sentence on the curriculum beside as many steps on all samples at once, whichever way it fell.

    Args:
        difference: of the result of a control, by how much the job that it is compared with scores above it.
    """
    points, low, high = (difference[name] for name in ("difference", "low", "high"))
    found = "helped" if low > 0 else "did harm" if high < 0 else "made no difference that can be told from chance"
    side = "above" if points >= 0 else "below"
    return (
        f"curriculum: final student {abs(points):.2f} points of ROUGE-L {side} its control (95 % interval {low:+.2f} "
        f"to {high:+.2f}): here it {found}; another seed may fall otherwise."
    )


def check_gains(evaluations: Sequence[Mapping[str, Any]]) -> int:
    """Compare the student before and after training on the held-out samples; 0 if both gains reach their threshold."""
    scores = scores_by_subject(evaluations)
    before, after = scores["initial"], scores["final"]
    ce_gain = before["cross_entropy"] - after["cross_entropy"]
    rouge_gain = after["rouge_l"] - before["rouge_l"]
    samples = after["rows"]
    passed = ce_gain >= MIN_CE_GAIN and rouge_gain >= MIN_ROUGE_GAIN and samples >= MIN_SAMPLES
    print(
        f"untrained to final student on {samples} held-out samples: CE {-ce_gain:+.2f} nat (needed: -{MIN_CE_GAIN}), "
        f"ROUGE-L {rouge_gain:+.2f} points (needed: +{MIN_ROUGE_GAIN}): {'passed' if passed else 'FAILED'}"
    )
    print("This measures likeness to the held-out answers, and not whether an answer is right.")
    return 0 if passed else 1
