"""The whole service under a storm of faults, and what its rows say of it afterwards.

Real workers, a scheduler and a broker serve small training jobs that are submitted all the while. Every few seconds
something is killed, frozen, cut off or asked to end. Then it is proven from the rows and the files that every job ended
once and right.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.faults.cluster import Cluster
from bench.faults.invariants import InvariantReport, check_invariants
from bench.faults.outcome import RunOutcome
from bench.faults.small_runs import VARIANTS, write_variant
from bench.report import Figure, table
from pocl.__main__ import read_spec
from pocl.run import run as distil
from pocl.storage.shared_cache import SharedCache

FAULTS: Final[Mapping[str, Callable[[Cluster, random.Random], bool]]] = {
    "kill engine": lambda cluster, rng: cluster.kill_engine(rng),
    "kill pool child": lambda cluster, rng: cluster.kill_child(rng),
    "kill worker": lambda cluster, rng: cluster.kill_worker(rng),
    "freeze worker": lambda cluster, rng: cluster.freeze_worker(rng),
    "freeze engine": lambda cluster, rng: cluster.freeze_engine(rng),
    "end worker": lambda cluster, rng: cluster.end_worker(rng),
    "kill scheduler": lambda cluster, _: cluster.kill_scheduler(),
    "kill broker": lambda cluster, _: cluster.kill_broker(),
    "freeze broker": lambda cluster, _: cluster.freeze_broker(),
    "empty broker": lambda cluster, _: cluster.empty_broker(),
    "cut connections": lambda cluster, _: cluster.cut_connections(),
    "lock database": lambda cluster, _: cluster.lock_database(),
    "cut database": lambda cluster, _: cluster.cut_database(),
    "cancel a job": lambda cluster, rng: cluster.cancel_some(rng),
    "pause a job": lambda cluster, rng: cluster.pause_some(rng),
}
_WAITING: Final = 3
"""Jobs that are kept in the queue."""
_CALM_SECONDS: Final = 600
"""Within which all jobs must have ended once nothing is broken any more."""
_WEIGHTS: Final = {"cancel a job": 1, "pause a job": 2, "freeze engine": 1}


@dataclass
class ChaosResult:
    """What happened, and what it came to."""

    database: str
    seed: int
    minutes: float
    faults: Counter[str] = field(default_factory=Counter)
    evidence: InvariantReport | None = None
    orphans: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failure(self) -> str | None:
        """Why the service did not stand it."""
        wrong = [*(self.evidence.wrong if self.evidence is not None else ["nothing was gathered"]), *self.orphans]
        return "; ".join(wrong) or None

    def record(self) -> dict[str, Any]:
        found = self.evidence
        return {
            "command": "chaos",
            "database": self.database,
            "seed": self.seed,
            "minutes": self.minutes,
            "faults": dict(self.faults),
            "jobs": dict(found.ends) if found is not None else {},
            "attempts": dict(found.attempts) if found is not None else {},
            "max_attempts": found.max_attempts if found is not None else None,
            "wrong": self.failure,
            "seconds": round(self.seconds, 1),
        }

    def text(self) -> str:
        rows: list[dict[str, Figure]] = [{"fault": name, "times": count} for name, count in self.faults.most_common()]
        rows.append({"fault": "all", "times": self.faults.total()})
        parts = [f"chaos: {self.database}, seed {self.seed}, {self.minutes:g} minutes", table(rows)]
        if self.evidence is not None:
            parts.append(self.evidence.text())
        parts.append(f"every job ended once and right: {'yes' if self.failure is None else 'NO: ' + self.failure}")
        return "\n\n".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the faults and jobs (default 0)")
    parser.add_argument("--minutes", type=float, default=2, help="of the storm; the baseline after it comes on top")
    parser.add_argument("--database-url", help="an empty PostgreSQL database (default: a SQLite file)")


def run(args: argparse.Namespace) -> ChaosResult:
    with tempfile.TemporaryDirectory(prefix="pocl-chaos-") as directory:
        return run_chaos(Path(directory), seed=args.seed, minutes=args.minutes, database_url=args.database_url)


def run_chaos(directory: Path, *, seed: int, minutes: float, database_url: str | None = None) -> ChaosResult:
    """Let the service stand a storm in `directory`, and check what its rows say."""
    rng = random.Random(seed)
    wanted = {name: baseline_weights(directory / "baseline" / name, name) for name in VARIANTS}
    cluster = Cluster.gathered(directory / "home", database_url)
    storm = ChaosResult("PostgreSQL" if database_url else "SQLite", seed, minutes)
    begun = time.monotonic()
    try:
        cluster.start()
        while time.monotonic() - begun < 60 * minutes:
            while cluster.waiting() < _WAITING:
                cluster.submit(rng.choice(sorted(VARIANTS)))
            name = rng.choices(list(FAULTS), [_WEIGHTS.get(name, 4) for name in FAULTS])[0]
            if FAULTS[name](cluster, rng):
                storm.faults[name] += 1
            cluster.tend(until=time.monotonic() + rng.uniform(0.5, 3.5))
        cluster.resume_all()
        calm_until = time.monotonic() + _CALM_SECONDS
        while cluster.live() and time.monotonic() < calm_until:
            cluster.tend(until=time.monotonic() + 0.5)
            cluster.resume_all()
        storm.evidence = check_invariants(cluster.database, cluster.store, cluster.submitted, wanted)
    finally:
        storm.orphans = cluster.dismiss()
    storm.seconds = time.monotonic() - begun
    return storm


def baseline_weights(directory: Path, variant: str) -> str:
    """SHA-256 of the weights that a variant ends in when it is left alone."""
    spec = read_spec(write_variant(directory, variant))
    workdir = directory / "run"
    distil(spec, workdir, lambda _event: None, shared_cache=SharedCache(directory / "cache", 1 << 30))
    final = RunOutcome.read(workdir).final
    shutil.rmtree(workdir)
    return final
