"""Throughput and latency of one API process: polls, lists, submissions, streams and downloads; and of MLflow's server.

The server runs on one core and the clients on another.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import api_load
from bench.api_clients import LoadProfile, LoadResult
from bench.machine import Machine
from bench.report import Figure, Report
from bench.server import AUTHORIZATION, Server, free_port, pocl_environment, run_load, running_server, scratch_home
from domain.db import Database
from domain.schema import upgrade
from domain.settings import Settings
from worker.processes import spawn, terminate

_CLIENTS = 32
_MIB = 1 << 20
_TRAIN_SECONDS = 120.0
_ARRIVAL_SECONDS = 5.0

Row = Mapping[str, Figure]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of each measurement (default 5)")
    parser.add_argument("--jobs", type=int, default=10_000, help="number of jobs in the long list (default 10000)")
    parser.add_argument("--followers", type=int, default=500, help="number of event streams at once (default 500)")
    parser.add_argument("--download-mib", type=int, default=1024, help="size of the file (default 1024)")
    parser.add_argument(
        "--downloads", type=int, default=20, help="number of clients that download it at once (default 20)"
    )
    parser.add_argument(
        "--postgres", metavar="URL", help="URL of an empty PostgreSQL database, which is measured too if given"
    )
    parser.add_argument("--mlflow", type=Path, metavar="PYTHON", default=os.environ.get("BENCH_MLFLOW"),
                        help="Python with MLflow, to measure its server as well (default $BENCH_MLFLOW)")  # fmt: skip
    parser.add_argument("--no-training", action="store_true", help="skip polling while a job trains")


def run(args: argparse.Namespace) -> Report:
    cores = sorted(os.sched_getaffinity(0))
    # `--threads 1` pins to one core, which server and clients then share.
    bench = _Bench(args, cores[0], cores[-1])
    rows: list[Row] = []
    with scratch_home() as home:
        rows += bench.ours("sqlite", home, f"sqlite:///{home / 'bench.db'}")
    if args.postgres:
        with scratch_home() as home:
            rows += bench.ours("postgresql", home, args.postgres)
    rows.append(bench.mlflow())
    settings = {"clients": _CLIENTS, "seconds": args.seconds, "jobs": args.jobs, "file_MiB": args.download_mib}
    return Report("api", settings, rows, Machine.measure(), notes=_notes(rows))


def _notes(rows: list[Row]) -> tuple[str, ...]:
    rates = {str(row["what"]): row["per_second"] for row in rows if row["database"] == "sqlite"}
    ours, theirs = rates.get("poll, 200"), rates.get("MLflow: get a run")
    if isinstance(ours, float) and isinstance(theirs, float):
        return (f"polling: {ours / theirs:.1f} times the rate of MLflow's server",)
    return ("MLflow was not measured: give --mlflow",)


def _row(what: str, database: str, load: LoadResult | None, **more: Figure) -> Row:
    times = load.latencies_ms if load is not None else ()
    return {
        "what": what,
        "database": database,
        "status": load.status if load is not None else None,
        "per_second": load.responses / load.seconds if load is not None else None,
        "p50_ms": times[len(times) // 2] if times else None,
        "p99_ms": times[min(len(times) - 1, len(times) * 99 // 100)] if times else None,
        "MiB_per_second": None,
        "peak_MiB": None,
        **more,
    }


@dataclass(frozen=True)
class _Bench:
    args: argparse.Namespace
    server_core: int
    client_core: int

    def ours(self, name: str, home: Path, database_url: str) -> Iterator[Row]:
        """All measurements of our server on one database."""
        port = free_port()
        environment = pocl_environment(home, database_url, port)
        settings = Settings(home=home, database_url=database_url)
        upgrade(settings)
        database = Database(database_url)
        command = [sys.executable, "-m", "api", "serve"]
        with running_server("the API", command, environment, port, "/readyz", self.server_core) as server:
            body = api_load.submission(port)
            if not self.args.no_training:
                with self._training(server, environment, body) as trained:
                    yield self._poll(server, name, "poll at 300/s, job training", trained, rate=300)
            job_id = str(api_load.post(port, "/v1/jobs", body)["id"])
            yield from self._polls(server, name, job_id)
            yield from self._lists(server, name, database, job_id)
            yield self._follow(server, name, database)
            yield self._download(server, name, database, settings.artifact_root, job_id)
            yield self._submit(server, name, body)
        database.close()

    def _polls(self, server: Server, name: str, job_id: str) -> Iterator[Row]:
        _, etag = api_load.get(server.port, f"/v1/jobs/{job_id}")
        yield self._poll(server, name, "poll, 200", job_id)
        yield self._poll(server, name, "poll, 304", job_id, f"if-none-match: {etag}\r\n")
        yield self._poll(server, name, "poll at 300/s, idle", job_id, rate=300)

    def _poll(self, server: Server, name: str, what: str, job_id: str, headers: str = "", rate: float = 0) -> Row:
        return _row(what, name, self._get(server, f"/v1/jobs/{job_id}", headers, rate))

    def _lists(self, server: Server, name: str, database: Database, job_id: str) -> Iterator[Row]:
        api_load.add_ended(database, job_id, 99)
        yield _row("list 20 of 100", name, self._get(server, "/v1/jobs"))
        api_load.add_ended(database, job_id, self.args.jobs - 100)
        yield _row(f"list 20 of {self.args.jobs}", name, self._get(server, "/v1/jobs"))

    def _submit(self, server: Server, name: str, body: object) -> Row:
        text = json.dumps(body)
        request = _head("POST", "/v1/jobs", f"content-type: application/json\r\ncontent-length: {len(text)}\r\n")
        return _row("submit", name, self._send(server, "closed_loop", request + text))

    def _follow(self, server: Server, name: str, database: Database) -> Row:
        held = api_load.claim(database)
        # Events are written once all followers are connected.
        writer = threading.Timer(_ARRIVAL_SECONDS, api_load.happen, (database, held, 10, 0.3))
        writer.start()
        request = _head("GET", f"/v1/jobs/{held.job_id}/events/stream")
        load = self._send(server, "follow", request, self.args.followers)
        writer.join()
        return _row(f"{self.args.followers} followers", name, load)

    def _download(self, server: Server, name: str, database: Database, artifacts: Path, job_id: str) -> Row:
        api_load.add_file(database, artifacts, job_id, self.args.download_mib * _MIB)
        server.reset_peak()
        before = server.peak_bytes
        load = self._send(server, "download", _head("GET", f"/v1/jobs/{job_id}/result"), self.args.downloads)
        rate = load.octets / load.seconds / _MIB
        what = f"{self.args.downloads} downloads"
        return _row(what, name, load, MiB_per_second=rate, peak_MiB=(server.peak_bytes - before) / _MIB)

    @contextmanager
    def _training(self, server: Server, environment: Mapping[str, str], body: object) -> Iterator[str]:
        """The id of a job that trains on one thread for as long as the block lasts."""
        job_id = str(api_load.post(server.port, "/v1/jobs", body)["id"])
        single_thread = {**environment, "OMP_NUM_THREADS": "1"}
        process = spawn([sys.executable, "-m", "bench.trainer"], stdout=subprocess.DEVNULL, environment=single_thread)
        try:
            deadline = time.monotonic() + _TRAIN_SECONDS
            while (status := api_load.get(server.port, f"/v1/jobs/{job_id}")[0]["status"]) != "running":
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the job that should train is {status}")
                time.sleep(0.1)
            yield job_id
        finally:
            terminate(process, 15)

    def mlflow(self) -> Row:
        """One run of MLflow, polled on its tracking server."""
        what = "MLflow: get a run"
        if self.args.mlflow is None or not Path(self.args.mlflow).exists():
            return _row(what, "sqlite", None)
        port = free_port()
        with scratch_home() as home:
            store = f"sqlite:///{home / 'mlflow.db'}"
            command = [str(self.args.mlflow), "-m", "mlflow", "server", "--backend-store-uri", store]
            command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
            with running_server("MLflow", command, dict(os.environ), port, "/health", self.server_core) as server:
                created = api_load.post(port, "/api/2.0/mlflow/runs/create", {"experiment_id": "0"})
                run_id = created["run"]["info"]["run_id"]
                return _row(what, "sqlite", self._get(server, f"/api/2.0/mlflow/runs/get?run_id={run_id}"))

    def _get(self, server: Server, path: str, headers: str = "", rate: float = 0) -> LoadResult:
        return self._send(server, "open_loop" if rate else "closed_loop", _head("GET", path, headers), rate=rate)

    def _send(self, server: Server, kind: str, request: str, clients: int = _CLIENTS, rate: float = 0) -> LoadResult:
        profile = LoadProfile("127.0.0.1", server.port, kind, request, clients, self.args.seconds, rate)
        return run_load(profile, self.client_core)


def _head(method: str, path: str, headers: str = "") -> str:
    return f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: {AUTHORIZATION}\r\n{headers}\r\n"
