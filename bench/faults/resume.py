"""Exact resume, measured: runs that crash at random moments end in the same bits as runs without a crash."""

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.faults.crash_injection import CommandEngine, Crash, Engine, ForkedEngine, draw_crash_points, run_with_crashes
from bench.faults.outcome import RunOutcome, manifest_errors, read_events, scratch_paths
from bench.faults.small_runs import CHECKPOINT_EVERY, VARIANTS, write_variant
from bench.report import Figure, table

_MAX_CRASHES_PER_RUN = 12


@dataclass
class ResumeResult:
    """The crashes of all runs, and what they cost."""

    crashes: list[Crash] = field(default_factory=list)
    runs: int = 0
    differing: list[str] = field(default_factory=list)
    """One line for each difference from the baseline: other bits, scratch files, damage, too many lost steps."""
    seconds: float = 0.0

    @property
    def failure(self) -> str | None:
        """A sentence where a run ended otherwise than its baseline; else null."""
        return "a run with crashes did not end like the run without" if self.differing else None

    def record(self) -> dict[str, Any]:
        """The result as plain values."""
        lost = [crash.lost_steps for crash in self.crashes]
        return {
            "command": "resume",
            "crashes": len(lost),
            "runs": self.runs,
            "by_phase": dict(Counter(crash.phase for crash in self.crashes)),
            "in_save": sum(crash.in_save for crash in self.crashes),
            "by_signal": dict(Counter(crash.kill_signal.name for crash in self.crashes)),
            "lost_steps": {"max": max(lost, default=0), "mean": sum(lost) / max(1, len(lost))},
            "checkpoint_every": CHECKPOINT_EVERY,
            "differing": self.differing,
            "seconds": round(self.seconds, 1),
            "each": [{**asdict(crash), "kill_signal": crash.kill_signal.name} for crash in self.crashes],
        }

    def text(self) -> str:
        """The result for people."""
        phases = [phase for phase, _ in Counter(crash.phase for crash in self.crashes).most_common()]
        rows = [_row(phase, [crash for crash in self.crashes if crash.phase == phase]) for phase in phases]
        total = self.record()
        lines = [
            table([*rows, _row("all", self.crashes)]),
            f"signals {total['by_signal']}; {self.runs} runs",
            f"steps lost in the mean {total['lost_steps']['mean']:.2f}, with a checkpoint every {CHECKPOINT_EVERY}",
            f"same bits as a run without crashes: {'NO' if self.differing else 'yes'}",
            *self.differing,
        ]
        return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=200, help="crashes in all (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    parser.add_argument("--commands", action="store_true", help="start each attempt as a new command (slower)")
    parser.add_argument("--directory", type=Path, help="where the runs are kept (default: a temporary directory)")


def run(args: argparse.Namespace) -> ResumeResult:
    engine: Engine = CommandEngine() if args.commands else ForkedEngine()
    with tempfile.TemporaryDirectory(prefix="pocl-resume-") as temporary:
        return measure(engine, args.directory or Path(temporary), kills=args.kills, seed=args.seed)


def measure(
    engine: Engine, directory: Path, *, kills: int, seed: int, variants: Iterable[str] = tuple(VARIANTS)
) -> ResumeResult:
    """Crash runs of the variants in turn until there were `kills` crashes, and compare each run with its baseline.

    Raises:
        RuntimeError: a run ended in any other way than well or by a crash.
    """
    rng = random.Random(seed)
    result = ResumeResult()
    baseline: dict[str, Path] = {}
    started_at = time.monotonic()
    for name in cycle(variants):
        if len(result.crashes) >= kills:
            break
        spec = write_variant(directory / name, name)
        if name not in baseline:
            baseline[name] = directory / name / "baseline"
            run_with_crashes(engine, spec, baseline[name], [])
        workdir = directory / name / f"run-{result.runs}"
        count = min(kills - len(result.crashes), _MAX_CRASHES_PER_RUN)
        crashes = run_with_crashes(engine, spec, workdir, draw_crash_points(rng, count, read_events(baseline[name])))
        differences = differences_from_baseline(workdir, baseline[name]) + excess_lost_steps(crashes)
        result.crashes += crashes
        result.differing += [f"{name}, {workdir.name}: {what}" for what in differences]
        result.runs += 1
    result.seconds = time.monotonic() - started_at
    return result


def differences_from_baseline(workdir: Path, baseline: Path) -> list[str]:
    """How a run with crashes differs from one without; empty when it does not."""
    differing = RunOutcome.read(workdir).differences(RunOutcome.read(baseline))
    return [
        *(f"another {name}" for name in differing),
        *(f"left {name}" for name in sorted(scratch_paths(workdir))),
        *manifest_errors(workdir),
    ]


def excess_lost_steps(crashes: Iterable[Crash]) -> list[str]:
    """One line for each crash that cost more than one checkpoint interval."""
    lost = [crash.lost_steps for crash in crashes]
    return [f"lost {steps} steps" for steps in lost if steps > CHECKPOINT_EVERY]


def _row(phase: str, crashes: Sequence[Crash]) -> dict[str, Figure]:
    return {
        "phase": phase,
        "crashes": len(crashes),
        "in_a_save": sum(crash.in_save for crash in crashes),
        "max_steps_lost": max((crash.lost_steps for crash in crashes), default=0),
    }
