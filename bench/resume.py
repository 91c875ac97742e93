"""Exact resume, shown: runs struck at random moments end in the same bits as undisturbed ones.

python -m bench.resume --kills 200 --seed 1
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.outcome import Outcome, damaged, litter, read_events
from bench.storm import Command, Engine, Forked, Strike, draw_moments, storm
from bench.variants import CHECKPOINT_EVERY, VARIANTS, write_variant

_MOST_STRIKES_A_RUN = 12


@dataclass
class Findings:
    """What the strikes of all storms came to."""

    strikes: list[Strike] = field(default_factory=list)
    runs: int = 0
    differing: list[str] = field(default_factory=list)
    """One line for each way in which a run ended otherwise: other bits, litter, damage, too many lost steps."""
    seconds: float = 0.0

    @property
    def identical(self) -> bool:
        return not self.differing

    @property
    def lost_steps(self) -> list[int]:
        return [strike.lost_steps for strike in self.strikes]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=50, help="strikes in all (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    parser.add_argument("--commands", action="store_true", help="start each attempt as a new command (slower)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--directory", type=Path, help="where the runs are kept (default: a temporary directory)")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if any run differed, else 0."""
    engine: Engine = Command() if args.commands else Forked()
    with tempfile.TemporaryDirectory(prefix="pocl-resume-") as temporary:
        findings = measure(engine, args.directory or Path(temporary), kills=args.kills, seed=args.seed)
    print(table(findings))
    if args.json is not None:
        args.json.write_text(json.dumps(figures(findings), indent=1) + "\n", encoding="utf-8")
    return 0 if findings.identical else 1


def measure(
    engine: Engine, directory: Path, *, kills: int, seed: int, variants: Iterable[str] = tuple(VARIANTS)
) -> Findings:
    """Strike runs of the variants in turn until there were `kills` strikes, and compare each with a calm one.

    Raises:
        RuntimeError: a run ended in any other way than well or by a strike.
    """
    rng = random.Random(seed)
    findings = Findings()
    calm: dict[str, Path] = {}
    begun = time.monotonic()
    for name in cycle(variants):
        if len(findings.strikes) >= kills:
            break
        spec = write_variant(directory / name, name)
        if name not in calm:
            calm[name] = directory / name / "calm"
            storm(engine, spec, calm[name], [])
        workdir = directory / name / f"run-{findings.runs}"
        count = min(kills - len(findings.strikes), _MOST_STRIKES_A_RUN)
        strikes = storm(engine, spec, workdir, draw_moments(rng, count, read_events(calm[name])))
        faults = faults_of(workdir, calm[name]) + excess_of(strikes)
        findings.strikes += strikes
        findings.differing += [f"{name}, {workdir.name}: {what}" for what in faults]
        findings.runs += 1
    findings.seconds = time.monotonic() - begun
    return findings


def faults_of(workdir: Path, calm: Path) -> list[str]:
    """How a run that was struck differs from one that was not; empty when it does not."""
    differing = Outcome.of(workdir).differences(Outcome.of(calm))
    return [
        *(f"another {name}" for name in differing),
        *(f"left {name}" for name in sorted(litter(workdir))),
        *damaged(workdir),
    ]


def excess_of(strikes: Iterable[Strike]) -> list[str]:
    """Strikes that cost more than one checkpoint interval."""
    lost = [strike.lost_steps for strike in strikes]
    return [f"lost {steps} steps" for steps in lost if steps > CHECKPOINT_EVERY]


def figures(findings: Findings) -> dict[str, Any]:
    """The findings as plain values."""
    lost = findings.lost_steps
    return {
        "strikes": len(lost),
        "runs": findings.runs,
        "by_phase": dict(Counter(strike.phase for strike in findings.strikes)),
        "in_save": sum(strike.in_save for strike in findings.strikes),
        "by_signal": dict(Counter(strike.by.name for strike in findings.strikes)),
        "lost_steps": {"max": max(lost, default=0), "mean": sum(lost) / max(1, len(lost))},
        "checkpoint_every": CHECKPOINT_EVERY,
        "identical": findings.identical,
        "differing": findings.differing,
        "seconds": round(findings.seconds, 1),
        "each": [{**asdict(strike), "by": strike.by.name} for strike in findings.strikes],
    }


def table(findings: Findings) -> str:
    """The findings for people."""
    lines = [f"{'phase':<18}{'strikes':>8}{'in a save':>11}{'most steps lost':>17}"]
    for phase, _ in Counter(strike.phase for strike in findings.strikes).most_common():
        struck = [strike for strike in findings.strikes if strike.phase == phase]
        saves, lost = sum(strike.in_save for strike in struck), max(strike.lost_steps for strike in struck)
        lines.append(f"{phase:<18}{len(struck):>8}{saves:>11}{lost:>17}")
    total = figures(findings)
    lost = total["lost_steps"]
    lines += [
        f"{'all':<18}{total['strikes']:>8}{total['in_save']:>11}{lost['max']:>17}",
        f"signals {total['by_signal']}; {findings.runs} runs; steps lost in the mean {lost['mean']:.2f}",
        f"same bits as an undisturbed run: {'yes' if findings.identical else 'NO'}",
        *findings.differing,
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.resume", description=__doc__.splitlines()[0])
    add_arguments(parser)
    # The bits depend on the number of threads, and small products are slower on several.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
