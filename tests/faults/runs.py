"""Runs in this process: whole, stopped, and what they report."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pocl.__main__ import read_spec
from pocl.errors import RunStopped
from pocl.events import Event, StepLogged, Warned
from pocl.run import run
from pocl.spec import DistillationSpec


def run_whole(spec: Path, workdir: Path) -> list[Event]:
    """Run to the end, or continue to it; the events."""
    events: list[Event] = []
    run(read_spec(spec), workdir, events.append)
    return events


def run_until(step: int, spec: Path, workdir: Path) -> None:
    """Run until `step` is logged, save and stop."""
    seen: set[int] = set()
    with pytest.raises(RunStopped):
        run(read_spec(spec), workdir, when_stepped(seen.add), lambda: step in seen)


def when_stepped(act: Callable[[int], None]) -> Callable[[Event], None]:
    """A sink that calls `act` with the number of each step."""

    def sink(event: Event) -> None:
        if isinstance(event, StepLogged):
            act(event.step)

    return sink


def warnings_in(events: list[Event]) -> list[str]:
    return [event.code for event in events if isinstance(event, Warned)]


def with_learning_rate(spec: Path, rate: float) -> DistillationSpec:
    """A specification whose learning rate is beyond what a client may ask for."""
    whole = read_spec(spec)
    return whole.model_copy(update={"training": whole.training.model_copy(update={"learning_rate": rate})})
