"""Schemathesis against a running service: all its checks, and what one answer links to sent on to the next.

No answer is a 5xx, and none has a status, a media type, a header or a body that the OpenAPI document does not name.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from domain.settings import Settings
from tests.fuzz.seed_data import insert_seed_data
from tests.support.api_process import ROOT, serving

SEED = 20_250_605
KEY = "a-key-for-the-fuzzer-alone"
CONFIGURATION = Path(__file__).with_name("schemathesis.toml")


@dataclass(frozen=True)
class FuzzTarget:
    """A running service with seed data."""

    address: str
    seed_ids: Mapping[str, str]
    """Ids of the seed data, as environment variables."""


@pytest.fixture
def target(database_url: str, tmp_path: Path) -> Iterator[FuzzTarget]:
    """A service with an API key and with seed data."""
    settings = Settings(home=tmp_path / "home", database_url=database_url)
    settings.home.mkdir(mode=0o700)
    seed_ids = insert_seed_data(settings, tmp_path / "seed-data")
    log = tmp_path / "log"
    with serving(
        settings.home,
        log,
        database_url=database_url,
        api_key=KEY,
        max_jobs_queued="100000",
        # No worker answers conversations here.
        chat_wait_seconds="1",
    ) as served:
        yield FuzzTarget(served.address, seed_ids)


def fuzz(target: FuzzTarget, reports: Path, *, seed: int, examples: int, phases: str) -> dict[str, Any]:
    """The report of Schemathesis; its output where it found an error."""
    report_file = reports / "schemathesis.json"
    # The document is built for the first who asks, which may take longer than Schemathesis waits.
    httpx2.get(f"{target.address}/openapi.json", timeout=300, verify=False).raise_for_status()
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIGURATION)]
    command += ["run", f"{target.address}/openapi.json", "--header", f"Authorization: Bearer {KEY}", "--checks", "all"]
    command += ["--phases", phases, "--seed", str(seed), "--max-examples", str(examples), "--continue-on-failure"]
    # How many inputs the generator throws away, and how fast it is on a busy machine, says nothing of the service.
    command += ["--suppress-health-check", "filter_too_much,too_slow"]
    command += [
        "--generation-database",
        "none",
        "--report",
        "json",
        "--report-json-path",
        str(report_file),
        "--no-color",
    ]
    # Schemathesis creates a directory where it runs, so it runs in `reports`.
    carried_out = reports / "carried-out"
    environment = {
        **os.environ,
        **target.seed_ids,
        "PYTHONPATH": str(ROOT),
        "FUZZ_CARRIED_OUT": str(carried_out),
    }
    completed = subprocess.run(command, cwd=reports, env=environment, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, f"seed {seed}\n{completed.stdout[-12_000:]}\n{completed.stderr[-2000:]}"
    report: dict[str, Any] = json.loads(report_file.read_text())
    assert report["complete"]
    report["carried_out"] = set(carried_out.read_text().split())
    return report


def operations_of(*tags: str) -> set[str]:
    """The names of the operations with one of these tags."""
    document = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
    found = (operation for path in document["paths"].values() for operation in path.values())
    return {operation["operationId"] for operation in found if operation["tags"][0] in tags}


def test_every_operation_answers_as_documented(target: FuzzTarget, tmp_path: Path) -> None:
    report = fuzz(target, tmp_path, seed=SEED, examples=6, phases="fuzzing,stateful")
    assert report["operations"]["tested"] == report["operations"]["total"] > 20
    assert report["test_cases"]["generated"] > 200
    # What changes with every call is carried out, and not refused alone for an id that nobody has.
    assert operations_of("keys", "projects", "webhooks") <= report["carried_out"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_requests_are_answered_as_documented(
    target: FuzzTarget, database_url: str, tmp_path: Path
) -> None:
    # The seed is fixed on one database and random on the other.
    is_fixed = database_url.startswith("sqlite")
    seed = SEED if is_fixed else int(os.environ.get("FUZZ_SEED", secrets.randbelow(2**32)))
    # To reproduce a failure; pytest shows it with a failure, and with -s.
    sys.stdout.write(f"seed {seed}\n")
    # How a schema is read depends on no database: what covers each of its keywords, most of the requests, is sent once.
    # With the fixed seed the test above sends what is made up at random.
    phases = "examples,coverage" if is_fixed else "examples,fuzzing,stateful"
    report = fuzz(target, tmp_path, seed=seed, examples=8, phases=phases)
    assert {phase["status"] for phase in report["phases"].values()} <= {"success", "skip"}
    sys.stdout.write(f"{report['test_cases']}\n")
    assert report["test_cases"]["generated"] >= (2500 if is_fixed else 400)
