"""A run that is asked to stop saves its state: no step is run again."""

from pathlib import Path

import pytest

from bench.faults.outcome import RunOutcome, manifest_errors, read_events
from bench.faults.small_runs import write_variant
from pocl.__main__ import read_spec
from pocl.errors import RunStopped
from pocl.events import Evaluated, Event, Progressed, RunStarted, StageFinished, StepLogged, Warned
from pocl.export.model_card import CARD_FILE
from pocl.run import run
from pocl.storage.shared_cache import SharedCache
from tests.faults.runs import run_to_end, run_until


@pytest.mark.parametrize("variant", ["restart", "convergence"])
def test_stop_during_an_evaluation_loses_no_step(variant: str, tmp_path: Path) -> None:
    path = write_variant(tmp_path, variant)
    spec, workdir, events = read_spec(path), tmp_path / "run", list[Event]()
    run_to_end(path, tmp_path / "baseline")

    def is_scoring_after_training() -> bool:
        stepped = any(isinstance(event, StepLogged) for event in events)
        return stepped and isinstance(events[-1], Progressed) and events[-1].phase == "evaluating"

    with pytest.raises(RunStopped):
        run(spec, workdir, events.append, is_scoring_after_training)
    done = max(event.step for event in events if isinstance(event, StepLogged))
    resumed = run_to_end(path, workdir)
    assert [event.resumed_from_step for event in resumed if isinstance(event, RunStarted)] == [done]
    assert min(event.step for event in resumed if isinstance(event, StepLogged)) == done + 1
    assert RunOutcome.read(workdir).differences(RunOutcome.read(tmp_path / "baseline")) == []


def test_pause_comes_at_stage_end_after_its_evaluation(restart: Path, baseline: RunOutcome, tmp_path: Path) -> None:
    spec, workdir, events = read_spec(restart), tmp_path / "run", list[Event]()

    def finished_stages(events: list[Event]) -> list[int]:
        return [event.stage for event in events if isinstance(event, StageFinished)]

    with pytest.raises(RunStopped):
        run(spec, workdir, events.append, should_pause=lambda: True)
    assert finished_stages(events) == [0]
    assert [event.stage for event in events if isinstance(event, Evaluated) and event.subject == "stage"] == [0]
    resumed = list[Event]()
    run(
        spec,
        workdir,
        resumed.append,
        should_pause=lambda: 1 in finished_stages(resumed) and len(finished_stages(resumed)) > 1,
    )
    assert finished_stages(resumed) == [1, 2]
    # The stage that was evaluated before the pause is not evaluated again.
    assert [event.stage for event in resumed if isinstance(event, Evaluated) and event.subject == "stage"] == [1, 2]
    assert RunOutcome.read(workdir).differences(baseline) == []


def test_live_teacher_in_place_of_a_cached_one_is_warned_about(restart: Path, tmp_path: Path) -> None:
    run_until(5, restart, tmp_path / "run")
    events: list[Event] = []
    run(read_spec(restart), tmp_path / "run", events.append, shared_cache=SharedCache(tmp_path / "none", 0))
    assert [event.message for event in events if isinstance(event, Warned) and event.code == "not_exact"] == [
        "continued with the teacher live, so not to the same bits"
    ]


def test_checkpoint_of_a_stage_has_its_own_scores(restart: Path, baseline: RunOutcome) -> None:
    workdir = restart.parent / "baseline"
    events = read_events(workdir)
    assert manifest_errors(workdir) == []
    scored = {event["stage"]: event for event in events if event["type"] == "evaluated" and event["subject"] == "stage"}
    saved = {event["stage"]: event for event in events if event["type"] == "checkpoint" and event["kind"] == "stage"}
    assert list(saved) == list(scored) == [0, 1, 2]
    for stage, checkpoint in saved.items():
        card = (workdir / checkpoint["path"] / CARD_FILE).read_text(encoding="utf-8")
        (line,) = (line for line in card.splitlines() if line.startswith(f"| stage {stage + 1} | `validation` |"))
        assert f"| {scored[stage]['cross_entropy']:.4f} |" in line
        assert f"| stage {stage + 2} |" not in card
    assert f"| {baseline.best_event['stage'] + 1} |" in (workdir / "best" / CARD_FILE).read_text(encoding="utf-8")


@pytest.mark.usefixtures("baseline")
def test_stage_is_saved_before_it_is_scored(restart: Path) -> None:
    events = read_events(restart.parent / "baseline")
    kinds = [
        (event["type"], event.get("kind") or event.get("subject"))
        for event in events
        if event.get("step") == 2 and event["type"] in ("checkpoint", "evaluated")
    ]
    assert kinds[:3] == [("checkpoint", "training"), ("evaluated", "stage"), ("checkpoint", "stage")]
