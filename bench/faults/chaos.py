"""The chaos test: faults are injected into the whole service, and invariants are checked afterwards.

Real workers, a scheduler and a broker serve small training jobs that are submitted all the while. Every few seconds
something is killed, frozen, cut off or asked to end. Then the rows and the files show whether every job ended once, and
in the weights of a run without faults.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.faults import small_disk
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
    "sick worker": lambda cluster, rng: cluster.make_worker_sick(rng),
    "suspend all": lambda cluster, _: cluster.suspend_all(),
    "clock step": lambda cluster, rng: cluster.step_clock(rng),
    "database away": lambda cluster, _: cluster.take_database_away(cluster.away_seconds),
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
    "disk full": lambda cluster, _: cluster.fill_disk(),
    "cancel a job": lambda cluster, rng: cluster.cancel_random_job(rng),
    "pause a job": lambda cluster, rng: cluster.pause_random_job(rng),
}
_QUEUED_JOBS: Final = 3
"""The number of jobs that wait in the queue at any time."""
_RECOVERY_SECONDS: Final = 600
"""The time within which all jobs must end once no more faults are injected."""
_DISK_MEGABYTES: Final = 1024
"""The size of the disk under all files of the service, in memory."""
_WEIGHTS: Final = {"cancel a job": 1, "pause a job": 2, "freeze engine": 1, "suspend all": 2, "database away": 1}


@dataclass
class ChaosResult:
    """The faults that were injected, and whether the service withstood them."""

    database: str
    seed: int
    minutes: float
    faults: Counter[str] = field(default_factory=Counter)
    report: InvariantReport | None = None
    orphans: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failure(self) -> str | None:
        """The invariants that were violated, joined; null if none was."""
        violations = self.report.violations if self.report is not None else ["the invariants were not checked"]
        return "; ".join([*violations, *self.orphans]) or None

    def record(self) -> dict[str, Any]:
        report = self.report
        return {
            "command": "chaos",
            "database": self.database,
            "seed": self.seed,
            "minutes": self.minutes,
            "faults": dict(self.faults),
            "jobs": dict(report.statuses) if report is not None else {},
            "attempts": dict(report.attempts) if report is not None else {},
            "max_attempts": report.max_attempts if report is not None else None,
            "wrong": self.failure,
            "seconds": round(self.seconds, 1),
        }

    def text(self) -> str:
        rows: list[dict[str, Figure]] = [{"fault": name, "times": count} for name, count in self.faults.most_common()]
        rows.append({"fault": "all", "times": self.faults.total()})
        parts = [f"chaos: {self.database}, seed {self.seed}, {self.minutes:g} minutes", table(rows)]
        if self.report is not None:
            parts.append(self.report.text())
        parts.append(f"every job ended once and right: {'yes' if self.failure is None else 'NO: ' + self.failure}")
        return "\n\n".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults and jobs (default 0)")
    parser.add_argument("--minutes", type=float, default=2, help="minutes of faults; the recovery comes on top")
    parser.add_argument("--database-url", help="an empty PostgreSQL database (default: a SQLite file)")


def run(args: argparse.Namespace) -> ChaosResult:
    can_mount = small_disk.enter_namespace()
    if not can_mount:
        print("no mount namespace can be created here, so no disk is filled", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="pocl-chaos-", ignore_cleanup_errors=True) as directory:
        if can_mount:
            small_disk.mount(Path(directory), _DISK_MEGABYTES)
        return run_chaos(Path(directory), seed=args.seed, minutes=args.minutes, database_url=args.database_url)


def run_chaos(
    directory: Path, *, seed: int, minutes: float, database_url: str | None = None, away_seconds: float = 60
) -> ChaosResult:
    """Inject faults into a service in `directory` for `minutes`, let it recover, and check the invariants.

    Args:
        away_seconds: how long the database is away, where that is the fault.
    """
    rng = random.Random(seed)
    expected = {name: baseline_weights(directory / "baseline" / name, name) for name in VARIANTS}
    cluster = Cluster.create(directory / "home", database_url, away_seconds)
    result = ChaosResult("PostgreSQL" if database_url else "SQLite", seed, minutes)
    started_at = time.monotonic()
    try:
        cluster.start()
        while time.monotonic() - started_at < 60 * minutes:
            while cluster.count_queued() < _QUEUED_JOBS:
                cluster.submit(rng.choice(sorted(VARIANTS)))
            name = rng.choices(list(FAULTS), [_WEIGHTS.get(name, 4) for name in FAULTS])[0]
            if FAULTS[name](cluster, rng):
                result.faults[name] += 1
            cluster.supervise(until=time.monotonic() + rng.uniform(0.5, 3.5))
        cluster.resume_all()
        deadline = time.monotonic() + _RECOVERY_SECONDS
        while cluster.count_live() and time.monotonic() < deadline:
            cluster.supervise(until=time.monotonic() + 0.5)
            cluster.resume_all()
        result.report = check_invariants(cluster.database, cluster.store, cluster.submitted, expected)
    finally:
        result.orphans = cluster.shut_down()
    result.seconds = time.monotonic() - started_at
    return result


def baseline_weights(directory: Path, variant: str) -> str:
    """SHA-256 of the weights in which a variant ends without faults."""
    spec = read_spec(write_variant(directory, variant))
    workdir = directory / "run"
    distil(spec, workdir, lambda _event: None, shared_cache=SharedCache(directory / "cache", 1 << 30))
    final = RunOutcome.read(workdir).final
    shutil.rmtree(workdir)
    return final
