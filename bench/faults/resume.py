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

from bench.faults.crash_injection import Command, Crash, Engine, Forked, draw_moments, storm
from bench.faults.outcome import Outcome, damaged, litter, read_events
from bench.faults.small_runs import CHECKPOINT_EVERY, VARIANTS, write_variant
from bench.report import Figure, table

_MOST_STRIKES_A_RUN = 12


@dataclass
class Findings:
    """What the strikes of all storms came to."""

    strikes: list[Crash] = field(default_factory=list)
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
        lost = [strike.lost_steps for strike in self.strikes]
        return {
            "command": "resume",
            "strikes": len(lost),
            "runs": self.runs,
            "by_phase": dict(Counter(strike.phase for strike in self.strikes)),
            "in_save": sum(strike.in_save for strike in self.strikes),
            "by_signal": dict(Counter(strike.by.name for strike in self.strikes)),
            "lost_steps": {"max": max(lost, default=0), "mean": sum(lost) / max(1, len(lost))},
            "checkpoint_every": CHECKPOINT_EVERY,
            "differing": self.differing,
            "seconds": round(self.seconds, 1),
            "each": [{**asdict(strike), "by": strike.by.name} for strike in self.strikes],
        }

    def text(self) -> str:
        """The findings for people."""
        phases = [phase for phase, _ in Counter(strike.phase for strike in self.strikes).most_common()]
        rows = [_row(phase, [strike for strike in self.strikes if strike.phase == phase]) for phase in phases]
        total = self.record()
        lines = [
            table([*rows, _row("all", self.strikes)]),
            f"signals {total['by_signal']}; {self.runs} runs",
            f"steps lost in the mean {total['lost_steps']['mean']:.2f}, with a checkpoint every {CHECKPOINT_EVERY}",
            f"same bits as an undisturbed run: {'NO' if self.differing else 'yes'}",
            *self.differing,
        ]
        return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=200, help="strikes in all (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    parser.add_argument("--commands", action="store_true", help="start each attempt as a new command (slower)")
    parser.add_argument("--directory", type=Path, help="where the runs are kept (default: a temporary directory)")


def run(args: argparse.Namespace) -> Findings:
    engine: Engine = Command() if args.commands else Forked()
    with tempfile.TemporaryDirectory(prefix="pocl-resume-") as temporary:
        return measure(engine, args.directory or Path(temporary), kills=args.kills, seed=args.seed)


def measure(
    engine: Engine, directory: Path, *, kills: int, seed: int, variants: Iterable[str] = tuple(VARIANTS)
) -> Findings:
    """Crash runs of the variants in turn until there were `kills` strikes, and compare each with a baseline one.

    Raises:
        RuntimeError: a run ended in any other way than well or by a strike.
    """
    rng = random.Random(seed)
    findings = Findings()
    baseline: dict[str, Path] = {}
    begun = time.monotonic()
    for name in cycle(variants):
        if len(findings.strikes) >= kills:
            break
        spec = write_variant(directory / name, name)
        if name not in baseline:
            baseline[name] = directory / name / "baseline"
            storm(engine, spec, baseline[name], [])
        workdir = directory / name / f"run-{findings.runs}"
        count = min(kills - len(findings.strikes), _MOST_STRIKES_A_RUN)
        strikes = storm(engine, spec, workdir, draw_moments(rng, count, read_events(baseline[name])))
        faults = faults_of(workdir, baseline[name]) + excess_of(strikes)
        findings.strikes += strikes
        findings.differing += [f"{name}, {workdir.name}: {what}" for what in faults]
        findings.runs += 1
    findings.seconds = time.monotonic() - begun
    return findings


def faults_of(workdir: Path, baseline: Path) -> list[str]:
    """How a run that was struck differs from one that was not; empty when it does not."""
    differing = Outcome.of(workdir).differences(Outcome.of(baseline))
    return [
        *(f"another {name}" for name in differing),
        *(f"left {name}" for name in sorted(litter(workdir))),
        *damaged(workdir),
    ]


def excess_of(strikes: Iterable[Crash]) -> list[str]:
    """Strikes that cost more than one checkpoint interval."""
    lost = [strike.lost_steps for strike in strikes]
    return [f"lost {steps} steps" for steps in lost if steps > CHECKPOINT_EVERY]


def _row(phase: str, strikes: Sequence[Crash]) -> dict[str, Figure]:
    return {
        "phase": phase,
        "strikes": len(strikes),
        "in_a_save": sum(strike.in_save for strike in strikes),
        "max_steps_lost": max((strike.lost_steps for strike in strikes), default=0),
    }
