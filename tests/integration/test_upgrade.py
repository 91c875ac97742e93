"""An upgrade without stopping everything, with the code of the generation before as it was."""

import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import httpx2
import pytest

import migrations
from domain.generations import GENERATION
from domain.jobs.states import JobStatus
from tests.support.api_process import ROOT, serving
from tests.support.harness import ServiceHarness
from tests.support.processes import Processes, ProcessHandle
from tests.support.requests import AUTHORIZED
from tests.support.waiting import eventually
from worker.processes import spawn, terminate

PINNED = Path(str(migrations.__file__)).parent / "generations" / f"{GENERATION - 1}.json"
StartOld = Callable[..., ProcessHandle]


def git(*arguments: str) -> bytes:
    ended = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)
    if ended.returncode:
        pytest.skip(f"the history is not here: {ended.stderr.decode()[:200]}")
    return ended.stdout


@pytest.fixture(scope="module")
def old_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of the generation before, out of the history."""
    revision = json.loads(PINNED.read_text())["revision"]
    (migration,) = PINNED.parents[1].glob(f"versions/{revision}_*.py")
    commit = git("log", "--format=%H", "-1", "--", str(migration.relative_to(ROOT))).decode().strip()
    if not commit:
        pytest.skip("this is no clone with a history")
    directory = tmp_path_factory.mktemp("old")
    archive = git("archive", commit, "api", "domain", "migrations", "pocl", "worker")
    with tarfile.open(fileobj=BytesIO(archive)) as packed:
        packed.extractall(directory, filter="data")
    return directory


@pytest.fixture
def start_old(old_code: Path, tmp_path: Path) -> Iterator[StartOld]:
    """Starts a process of the old code; none outlives the test."""
    with ExitStack() as stack:

        def start(environment: dict[str, str], *arguments: str) -> ProcessHandle:
            # It refuses settings that it does not know.
            known = {name: value for name, value in environment.items() if name != "POCL_WORKER_LEADER_SECONDS"}
            log = tmp_path / f"old-{'-'.join(arguments)}.log"
            with log.open("ab") as output:
                process = spawn(
                    [sys.executable, "-P", "-m", *arguments],
                    stdout=output,
                    environment={**known, "PYTHONPATH": str(old_code)},
                    directory=old_code,
                )
            stack.callback(terminate, process, grace=0)
            return ProcessHandle(process, log)

        yield start


@pytest.mark.slow
def test_worker_of_the_generation_before_finishes_jobs_beside_the_new_api(
    start_old: StartOld, empty_database_url: str, redis_url: str, queue: str, processes: Processes, tmp_path: Path
) -> None:
    harness = ServiceHarness(tmp_path / "home", empty_database_url, redis_url=redis_url)
    harness.home.mkdir(mode=0o700)
    environment = harness.environment(queue=queue)
    assert start_old(environment, "api", "migrate").wait_for_exit() == 0
    old_scheduler, old_worker = start_old(environment, "worker", "scheduler"), start_old(environment, "worker", "run")
    old_worker.wait_for_log("ready")
    command = [sys.executable, "-P", "-m", "api", "migrate"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    with serving(harness.home, tmp_path / "api.log", database_url=empty_database_url) as service:
        client = httpx2.Client(base_url=service.address, headers=AUTHORIZED, timeout=60)
        first = harness.submit()
        eventually(lambda: harness.job(first).status is JobStatus.SUCCEEDED, within=120, what="the old worker ends it")
        assert harness.attempts(first)[0].worker.endswith(f"-{old_worker.pid}")
        (view,) = client.get("/v1/workers").json()["data"]
        assert (view["id"], view["generation"], view["version"]) == (harness.attempts(first)[0].worker, None, None)
        assert client.get("/version").json()["generation"] == GENERATION
        assert client.get("/readyz").status_code == 200
        # A worker of the new generation, beside the old scheduler.
        old_worker.process.send_signal(signal.SIGTERM)
        old_worker.wait_for_exit()
        processes.start("run", environment)
        second = harness.submit()
        eventually(lambda: harness.job(second).status is JobStatus.SUCCEEDED, within=120, what="the new worker ends it")
        (view,) = client.get("/v1/workers").json()["data"]
        assert view["generation"] == GENERATION
        # And the new scheduler in the place of the old one.
        old_scheduler.process.send_signal(signal.SIGTERM)
        old_scheduler.wait_for_exit()
        processes.start("scheduler", environment)
        third = harness.submit()
        eventually(lambda: harness.job(third).status is JobStatus.SUCCEEDED, within=120, what="the new scheduler rings")
        client.close()
    # What knows no generations refuses every newer schema when it starts.
    refused = start_old(environment, "worker", "run")
    assert refused.wait_for_exit() == 2
    assert "newer version" in refused.log
    harness.close()
