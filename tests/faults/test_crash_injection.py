"""Killed at any moment and started again, a run ends in the same bits as a run without crashes."""

import signal
from pathlib import Path

import pytest

from bench.faults.crash_injection import CommandEngine, CrashPoint, Engine, ForkedEngine, run_with_crashes
from bench.faults.resume import differences_from_baseline, excess_lost_steps, measure

IN_EVERY_PHASE = [
    CrashPoint(0, phase="loading"),
    CrashPoint(1, phase="ranking"),
    CrashPoint(0, phase="caching_teacher"),
    CrashPoint(4, phase="training", in_save=True),
    CrashPoint(0, phase="evaluating"),
    CrashPoint(2, phase="training", kill_signal=signal.SIGTERM),
    CrashPoint(0, phase="exporting"),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return ForkedEngine()


@pytest.mark.usefixtures("baseline")
def test_run_that_crashes_in_every_phase_ends_in_the_same_bits(engine: Engine, restart: Path, tmp_path: Path) -> None:
    crashes = run_with_crashes(engine, restart, tmp_path / "run", IN_EVERY_PHASE)
    # Where the machine stalls this process, the run may finish before the last crash point.
    assert len(crashes) > len(IN_EVERY_PHASE) // 2
    assert differences_from_baseline(tmp_path / "run", restart.parent / "baseline") == []
    assert excess_lost_steps(crashes) == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["restart", "carry", "convergence"])
def test_run_that_crashes_at_random_moments_ends_in_the_same_bits(engine: Engine, tmp_path: Path, variant: str) -> None:
    result = measure(engine, tmp_path, kills=12, seed=5, variants=[variant])
    assert result.differing == []
    assert len(result.crashes) == 12


@pytest.mark.slow
def test_command_that_crashes_ends_in_the_same_bits(tmp_path: Path) -> None:
    result = measure(CommandEngine(), tmp_path, kills=3, seed=6, variants=["restart"])
    assert result.differing == []
