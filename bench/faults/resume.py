"""Exact resume, shown: runs struck at random moments end in the same bits as undisturbed ones."""

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
    """What the crashes of all storms came to."""

    crashes: list[Crash] = field(default_factory=list)
    runs: int = 0
    differing: list[str] = field(default_factory=list)
    """One line for each way in which a run ended otherwise: other bits, litter, damage, too many lost steps."""
    seconds: float = 0.0

    @property
    def failure(self) -> str | None:
        """Whether a run ended otherwise than an undisturbed one."""
        return "a run that was struck did not end like one that was not" if self.differing else None

    def record(self) -> dict[str, Any]:
        """The findings as plain values."""
        lost = [crash.lost_steps for crash in self.crashes]
        return {
            "command": "resume",
            "crashes": len(lost),
            "runs": self.runs,
            "by_phase": dict(Counter(crash.phase for crash in self.crashes)),
            "in_save": sum(crash.in_save for crash in self.crashes),
            "by_signal": dict(Counter(crash.by.name for crash in self.crashes)),
            "lost_steps": {"max": max(lost, default=0), "mean": sum(lost) / max(1, len(lost))},
            "checkpoint_every": CHECKPOINT_EVERY,
            "differing": self.differing,
            "seconds": round(self.seconds, 1),
            "each": [{**asdict(crash), "by": crash.by.name} for crash in self.crashes],
        }

    def text(self) -> str:
        """The findings for people."""
        phases = [phase for phase, _ in Counter(crash.phase for crash in self.crashes).most_common()]
        rows = [_row(phase, [crash for crash in self.crashes if crash.phase == phase]) for phase in phases]
        total = self.record()
        lines = [
            table([*rows, _row("all", self.crashes)]),
            f"signals {total['by_signal']}; {self.runs} runs",
            f"steps lost in the mean {total['lost_steps']['mean']:.2f}, with a checkpoint every {CHECKPOINT_EVERY}",
            f"same bits as an undisturbed run: {'NO' if self.differing else 'yes'}",
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
    """Crash runs of the variants in turn until there were `kills` crashes, and compare each with a baseline one.

    Raises:
        RuntimeError: a run ended in any other way than well or by a crash.
    """
    rng = random.Random(seed)
    findings = ResumeResult()
    baseline: dict[str, Path] = {}
    begun = time.monotonic()
    for name in cycle(variants):
        if len(findings.crashes) >= kills:
            break
        spec = write_variant(directory / name, name)
        if name not in baseline:
            baseline[name] = directory / name / "baseline"
            run_with_crashes(engine, spec, baseline[name], [])
        workdir = directory / name / f"run-{findings.runs}"
        count = min(kills - len(findings.crashes), _MAX_CRASHES_PER_RUN)
        crashes = run_with_crashes(engine, spec, workdir, draw_crash_points(rng, count, read_events(baseline[name])))
        faults = differences_from_baseline(workdir, baseline[name]) + excess_lost_steps(crashes)
        findings.crashes += crashes
        findings.differing += [f"{name}, {workdir.name}: {what}" for what in faults]
        findings.runs += 1
    findings.seconds = time.monotonic() - begun
    return findings


def differences_from_baseline(workdir: Path, baseline: Path) -> list[str]:
    """How a run that was struck differs from one that was not; empty when it does not."""
    differing = RunOutcome.read(workdir).differences(RunOutcome.read(baseline))
    return [
        *(f"another {name}" for name in differing),
        *(f"left {name}" for name in sorted(scratch_paths(workdir))),
        *manifest_errors(workdir),
    ]


def excess_lost_steps(crashes: Iterable[Crash]) -> list[str]:
    """Strikes that cost more than one checkpoint interval."""
    lost = [crash.lost_steps for crash in crashes]
    return [f"lost {steps} steps" for steps in lost if steps > CHECKPOINT_EVERY]


def _row(phase: str, crashes: Sequence[Crash]) -> dict[str, Figure]:
    return {
        "phase": phase,
        "crashes": len(crashes),
        "in_a_save": sum(crash.in_save for crash in crashes),
        "max_steps_lost": max((crash.lost_steps for crash in crashes), default=0),
    }
