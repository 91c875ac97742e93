"""Killed at any moment and started again, a run ends in the same bits as one that was left alone."""

import signal
from pathlib import Path

import pytest

from bench.faults.crash_injection import Command, Engine, Forked, Moment, storm
from bench.faults.resume import excess_of, faults_of, measure

IN_EVERY_PHASE = [
    Moment(0, phase="loading"),
    Moment(1, phase="ranking"),
    Moment(0, phase="caching_teacher"),
    Moment(4, phase="training", in_save=True),
    Moment(0, phase="evaluating"),
    Moment(2, phase="training", by=signal.SIGTERM),
    Moment(0, phase="exporting"),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Forked()


@pytest.mark.usefixtures("baseline")
def test_struck_once_in_every_phase(engine: Engine, restart: Path, tmp_path: Path) -> None:
    strikes = storm(engine, restart, tmp_path / "run", IN_EVERY_PHASE)
    # On a machine that stalls this process, the run may have ended before the last strike.
    assert len(strikes) > len(IN_EVERY_PHASE) // 2
    assert faults_of(tmp_path / "run", restart.parent / "baseline") == []
    assert excess_of(strikes) == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["restart", "carry", "convergence"])
def test_struck_at_random_moments(engine: Engine, tmp_path: Path, variant: str) -> None:
    findings = measure(engine, tmp_path, kills=20, seed=5, variants=[variant])
    assert findings.differing == []
    assert len(findings.strikes) == 20


@pytest.mark.slow
def test_the_command_itself_is_struck(tmp_path: Path) -> None:
    findings = measure(Command(), tmp_path, kills=4, seed=6, variants=["restart"])
    assert findings.differing == []
