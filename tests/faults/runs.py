"""Runs in this process, to the end or up to a step, and the events that they report."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pocl.__main__ import read_spec
from pocl.errors import RunStopped
from pocl.events import Event, StepLogged, Warned
from pocl.run import run
from pocl.spec import DistillationSpec


def run_to_end(spec: Path, workdir: Path) -> list[Event]:
    """Run, or continue a run, to the end; the events."""
    events: list[Event] = []
    run(read_spec(spec), workdir, events.append)
    return events


def run_until(step: int, spec: Path, workdir: Path) -> None:
    """Run until `step` is logged, save and stop."""
    logged: set[int] = set()
    with pytest.raises(RunStopped):
        run(read_spec(spec), workdir, on_step(logged.add), lambda: step in logged)


def on_step(callback: Callable[[int], None]) -> Callable[[Event], None]:
    """A sink that calls `callback` with the number of each step."""

    def sink(event: Event) -> None:
        if isinstance(event, StepLogged):
            callback(event.step)

    return sink


_WITHOUT_FAULTS = {
    "best_by_cross_entropy", "metric_constant", "ranking_by_cut_student", "ranking_constant", "ranking_mostly_zero",
}  # fmt: skip
"""What runs of tiny models are warned of in any case: their answers score next to nothing."""


def warning_codes(events: list[Event]) -> list[str]:
    """The codes of the warnings, but for those about scores."""
    codes = [event.code for event in events if isinstance(event, Warned)]
    return [code for code in codes if code not in _WITHOUT_FAULTS]


def with_learning_rate(spec: Path, rate: float) -> DistillationSpec:
    """A specification whose learning rate is beyond what a client may ask for."""
    resolved = read_spec(spec)
    return resolved.model_copy(update={"training": resolved.training.model_copy(update={"learning_rate": rate})})
