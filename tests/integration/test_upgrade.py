"""An upgrade without stopping everything: two neighbouring generations of the code on one database.

The older of them is out of the history where it has one, and else this code beside a next release that is made of it.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import httpx2
import pytest

import migrations
from domain.generations import FIRST_GENERATION, GENERATION
from domain.jobs.states import JobStatus
from domain.schema import newest_revision
from tests.support.api_process import ROOT, serving
from tests.support.harness import ServiceHarness
from tests.support.processes import ProcessHandle
from tests.support.requests import AUTHORIZED
from tests.support.waiting import eventually
from worker.processes import spawn, terminate

PINNED = Path(str(migrations.__file__)).parent / "generations" / f"{GENERATION - 1}.json"
PACKAGES = ("api", "domain", "migrations", "pocl", "worker")
NEXT_MIGRATION = '''
"""What a next release might add."""

import sqlalchemy as sa
from alembic import op

revision = "next"
down_revision = "{newest}"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("next_note", sa.Text()))
    op.add_column("workers", sa.Column("next_count", sa.Integer(), nullable=False, server_default="0"))
    op.create_table("next_things", sa.Column("id", sa.String(64), primary_key=True))
    op.create_index("ix_jobs_next_note", "jobs", ["next_note"])
'''


@dataclass(frozen=True)
class Release:
    """The code of a release."""

    code: Path
    generation: int


def git(*arguments: str) -> bytes:
    ended = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)
    if ended.returncode:
        pytest.skip(f"the history is not here: {ended.stderr.decode()[:200]}")
    return ended.stdout


def generation_of(code: Path) -> int:
    file = code / "domain" / "generations.py"
    found = re.search(r"^GENERATION: Final = (\d+)$", file.read_text(), re.MULTILINE) if file.exists() else None
    return int(found[1]) if found else FIRST_GENERATION


def take_from_history(directory: Path) -> Release:
    """The generation before, as it was at the migration with which it was released."""
    revision = json.loads(PINNED.read_text())["revision"]
    (migration,) = PINNED.parents[1].glob(f"versions/{revision}_*.py")
    commit = git("log", "--format=%H", "-1", "--", str(migration.relative_to(ROOT))).decode().strip()
    if not commit:
        pytest.skip("this is no clone with a history")
    with tarfile.open(fileobj=BytesIO(git("archive", commit, *PACKAGES))) as packed:
        packed.extractall(directory, filter="data")
    release = Release(directory, generation_of(directory))
    if release.generation != GENERATION - 1:
        pytest.skip("the history has no commit of the generation before")
    return release


def make_next(directory: Path) -> Release:
    """A release after this one, whose migration adds columns, a table and an index."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    file = directory / "domain" / "generations.py"
    line = f"GENERATION: Final = {GENERATION}\n"
    assert line in file.read_text()
    file.write_text(file.read_text().replace(line, f"GENERATION: Final = {GENERATION + 1}\n"))
    migration = NEXT_MIGRATION.format(newest=newest_revision())
    (directory / "migrations" / "versions" / "next.py").write_text(migration)
    return Release(directory, generation_of(directory))


@pytest.fixture(scope="module", params=["out of the history", "this beside the next"])
def releases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, Release]:
    """Two that are neighbours, the older first."""
    directory = tmp_path_factory.mktemp("release")
    this = Release(ROOT, GENERATION)
    return (take_from_history(directory), this) if "history" in request.param else (this, make_next(directory))


Start = Callable[..., ProcessHandle]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `python -m ...` of a release; none outlives the test."""
    with ExitStack() as stack:

        def start_module(release: Release, environment: dict[str, str], *arguments: str) -> ProcessHandle:
            # A code from before leadership refuses settings that it does not know.
            unknown = {"POCL_WORKER_LEADER_SECONDS"} if release.generation == FIRST_GENERATION else set()
            known = {name: value for name, value in environment.items() if name not in unknown}
            log = tmp_path / f"{release.generation}-{'-'.join(arguments)}.log"
            with log.open("ab") as output:
                process = spawn(
                    [sys.executable, "-P", "-m", *arguments],
                    stdout=output,
                    environment={**known, "PYTHONPATH": str(release.code)},
                    directory=release.code,
                )
            stack.callback(terminate, process, grace=0)
            return ProcessHandle(process, log)

        yield start_module


def stop(process: ProcessHandle) -> None:
    process.process.send_signal(signal.SIGTERM)
    process.wait_for_exit()


@pytest.mark.slow
def test_two_neighbouring_releases_share_a_database_while_one_replaces_the_other(
    releases: Sequence[Release], start: Start, empty_database_url: str, redis_url: str, queue: str, tmp_path: Path
) -> None:
    old, new = releases
    assert new.generation == old.generation + 1
    harness = ServiceHarness(tmp_path / "home", empty_database_url, redis_url=redis_url)
    harness.home.mkdir(mode=0o700)
    environment = harness.environment(queue=queue)
    start_old, start_new = partial(start, old, environment), partial(start, new, environment)
    assert start_old("api", "migrate").wait_for_exit() == 0
    old_scheduler, old_worker = start_old("worker", "scheduler"), start_old("worker", "run")
    old_worker.wait_for_log("ready")
    assert start_new("api", "migrate").wait_for_exit() == 0
    with (
        serving(harness.home, tmp_path / "api.log", code=new.code, database_url=empty_database_url) as service,
        httpx2.Client(base_url=service.address, headers=AUTHORIZED, timeout=60) as client,
    ):
        assert client.get("/version").json()["generation"] == new.generation
        assert client.get("/readyz").status_code == 200

        def run_job(what: str) -> None:
            job = harness.submit()
            eventually(lambda: harness.job(job).status is JobStatus.SUCCEEDED, within=120, what=what)
            (view,) = client.get("/v1/workers").json()["data"]
            assert view["id"] == harness.attempts(job)[0].worker
            assert view["generation"] == (
                None if running is old and old.generation == FIRST_GENERATION else running.generation
            )

        running = old
        run_job("the old worker ends a job beside the new API")
        stop(old_worker)
        running = new
        start_new("worker", "run")
        run_job("the new worker ends a job beside the old scheduler")
        stop(old_scheduler)
        start_new("worker", "scheduler")
        run_job("the new scheduler rings")
    again = start_old("worker", "run")
    if old.generation == FIRST_GENERATION:
        # What knows no generations refuses every newer schema when it starts.
        assert again.wait_for_exit() == 2
        assert "newer version" in again.log
    else:
        again.wait_for_log("schema_of_next_generation")
    harness.close()
