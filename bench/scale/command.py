"""What a large service asks of PostgreSQL: claims, heartbeats, events, lists and polls, and how each grows.

The same is measured over a tenth of everything and over all of it. Clients and database share the machine.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

from bench.machine import Machine
from bench.report import Figure, Report
from bench.scale.fleet import Fleet, Timings, closed_loop
from bench.scale.population import BYSTANDER, Population, fill, table_sizes
from domain.db import Database
from domain.jobs.queue import list_queued
from domain.jobs.repository import list_jobs
from domain.jobs.retries import NO_WAIT, count_claimable
from domain.jobs.snapshot import job_snapshots
from domain.jobs.states import JobStatus
from domain.schema import upgrade
from domain.settings import Settings
from worker.reaper import Reaper
from worker.settings import WorkerSettings

_MIB = 1 << 20
_LIVE_SECONDS = 60.0

Row = Mapping[str, Figure]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--postgres", metavar="URL", required=True, help="URL of an empty PostgreSQL database")
    parser.add_argument("--jobs", type=int, default=1_000_000, help="number of jobs (default 1000000)")
    parser.add_argument("--queued", type=int, default=100_000, help="how many of them wait (default 100000)")
    parser.add_argument("--projects", type=int, default=200, help="number of projects (default 200)")
    parser.add_argument("--workers", type=int, default=2000, help="number of workers (default 2000)")
    parser.add_argument("--clients", type=int, default=8, help="transactions at once (default 8)")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of each measurement (default 10)")
    parser.add_argument(
        "--job-minutes", type=float, default=30.0, help="how long a job takes a worker, for their mixture (default 30)"
    )


def run(args: argparse.Namespace) -> Report:
    population = Population(args.jobs, args.queued, args.projects, args.workers)
    upgrade(Settings(database_url=args.postgres))
    database = Database(args.postgres)
    measured = []
    for part in (population.divided(10), population):
        fill(database, part)
        measured.append(list(_measure(database, part, args)))
    sizes = table_sizes(database)
    database.close()
    tenth, whole = measured
    rows = [_row(*each) for each in zip(tenth, whole, strict=True)]
    checks: dict[str, Figure] = {f"{name} MiB": size / _MIB for name, size in sizes.items()}
    work = next(timings for name, timings in whole if name == _WORK)
    each = Fleet.actions_per_second(args.job_minutes * 60)
    note = f"one worker makes {each:.2f} transactions a second: {work.per_second / each:.0f} workers keep this busy"
    return Report("scale", asdict(population), rows, Machine.measure(), checks=checks, notes=(note,))


_WORK = "work of a fleet, mixed"


def _measure(database: Database, population: Population, args: argparse.Namespace) -> Iterator[tuple[str, Timings]]:
    seconds: float = args.seconds
    fleet = Fleet(database, population.workers, args.clients)
    fleet.register_all()
    yield "claim", fleet.claim(3600)
    yield "heartbeat of a lease", fleet.heartbeat(seconds)
    yield "heartbeat of a worker", fleet.register(seconds)
    yield "20 engine events", fleet.report(seconds)
    yield _WORK, fleet.work(seconds, args.job_minutes * 60)
    yield from _reads(database, args.clients, seconds)
    reaper = Reaper(database, lease_seconds=_LIVE_SECONDS, interval=seconds)
    reaper.look()
    yield "scheduler: look at leases", closed_loop(lambda _: reaper.look(), 1, count=None, seconds=seconds)


def _reads(database: Database, clients: int, seconds: float) -> Iterator[tuple[str, Timings]]:
    with database.transaction(write=False) as session:
        page = list_jobs(session, BYSTANDER, limit=100).rows
        queued = list_jobs(session, BYSTANDER, limit=1, statuses=[JobStatus.QUEUED]).rows[0].id
        running = list_jobs(session, BYSTANDER, limit=1, statuses=[JobStatus.PREPARING, JobStatus.RUNNING]).rows
        ended = list_jobs(session, BYSTANDER, limit=1, statuses=[JobStatus.SUCCEEDED]).rows[0].id
    held = running[0].id if running else page[0].id
    reads: dict[str, Callable[[Database], object]] = {
        "list 20 jobs": lambda each: _list(each, ()),
        "list 20 running jobs": lambda each: _list(each, (JobStatus.RUNNING,)),
        "list 20 jobs, old": lambda each: _list(each, (), after=ended),
        "list 20 of the queue": lambda each: _list_queue(each),
        "poll a held job": lambda each: _poll(each, held),
        "poll a queued job": lambda each: _poll(each, queued),
        "scheduler: count what may be claimed": _count,
    }
    for name, read in reads.items():
        yield name, closed_loop(lambda _, read=read: read(database), clients, count=None, seconds=seconds)  # type: ignore[misc] # mypy infers no type for a default


def _list(database: Database, statuses: tuple[JobStatus, ...], after: str | None = None) -> int:
    with database.transaction(write=False) as session:
        return len(list_jobs(session, BYSTANDER, limit=20, statuses=statuses, after=after).rows)


def _list_queue(database: Database) -> None:
    with database.transaction(write=False) as session:
        list_queued(session, BYSTANDER, limit=20, worker_seconds=_LIVE_SECONDS)


def _poll(database: Database, job_id: str) -> None:
    with database.transaction(write=False) as session:
        job_snapshots(session, [job_id], worker_seconds=_LIVE_SECONDS)


def _count(database: Database) -> int:
    with database.transaction(write=False) as session:
        return count_claimable(session, NO_WAIT, limit=WorkerSettings().doorbell_limit)


def _row(tenth: tuple[str, Timings], whole: tuple[str, Timings]) -> Row:
    before, after = tenth[1].quantile_ms(0.5), whole[1].quantile_ms(0.5)
    return {
        "what": whole[0],
        "per_second": whole[1].per_second,
        "p50_ms": after,
        "p99_ms": whole[1].quantile_ms(0.99),
        "p50_of_a_tenth_ms": before,
        "p99_of_a_tenth_ms": tenth[1].quantile_ms(0.99),
        "growth": after / before if before and after else None,
    }
