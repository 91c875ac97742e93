"""`python -m worker serve`: everything under one command, and nothing left when it ends, however it ends."""

import os
import signal
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from domain.jobs.states import JobStatus
from domain.workers.repository import list_workers
from tests.support.cluster import children_of
from tests.support.harness import ServiceHarness, kill, processes_mentioning
from tests.support.processes import Processes, ProcessHandle, terminal_signals
from tests.support.waiting import eventually

Start = Callable[..., ProcessHandle]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def cluster(home: Path) -> ServiceHarness:
    return ServiceHarness(home, f"sqlite:///{home / 'pocl.sqlite3'}", heartbeat_seconds=0.5)


@pytest.fixture
def start(cluster: ServiceHarness, processes: Processes) -> Start:
    def launch(*arguments: str, engine: tuple[str, ...] = (), **variables: str) -> ProcessHandle:
        return processes.start("serve", {**cluster.environment(*engine), **variables}, *(arguments or ("--port", "0")))

    return launch


def address(launcher: ProcessHandle) -> str:
    return launcher.wait_for_log("READY").removeprefix("READY ")


def alive(url: str) -> bool:
    with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
        return bool(answer.status == 200)


def nothing_is_left(home: Path) -> bool:
    return not processes_mentioning(str(home))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_signal_stops_everything(start: Start, home: Path, number: signal.Signals) -> None:
    with terminal_signals(signal.SIG_DFL):
        launcher = start()
    assert alive(address(launcher))
    assert len(processes_mentioning(str(home))) >= 5
    launcher.process.send_signal(number)
    assert launcher.wait_for_exit() == 0
    assert nothing_is_left(home)
    assert launcher.log.count("READY") == 1


@pytest.mark.slow
def test_terminal_ends_nothing_that_was_started_to_ignore_it(start: Start, cluster: ServiceHarness, home: Path) -> None:
    with terminal_signals(signal.SIG_IGN):
        launcher = start()
    assert alive(address(launcher))
    for pid in (launcher.pid, *processes_mentioning(str(home))):
        kill(pid, signal.SIGHUP)
    # Its children are in sessions of their own, which Ctrl-C does not reach.
    kill(launcher.pid, signal.SIGINT)
    # Only the services: what these start for one task, such as the pool child of a worker, ends with it.
    services = children_of(launcher.pid)
    assert len(services) >= len(("broker", "api", "scheduler", "worker"))
    job = cluster.submit()
    eventually(lambda: cluster.job(job).status is JobStatus.SUCCEEDED, within=60, what="the job")
    assert alive(address(launcher))
    assert set(services) <= set(children_of(launcher.pid))
    cluster.close()


def test_ready_message_names_every_place(start: Start, home: Path) -> None:
    launcher = start()
    url = address(launcher)
    with urllib.request.urlopen(f"{url}/docs", timeout=10) as answer:
        assert answer.status == 200
    for place in (f"{url}/v1", f"{url}/docs", home / "models", home / "artifacts", home / "logs"):
        assert f" {place}\n" in launcher.log or f" {place}   (" in launcher.log, place
    assert "make model" in launcher.log
    names = launcher.wait_for_log("  logs").partition("(")[2].rstrip(")").split(", ")
    assert sorted(names) == sorted(path.name for path in (home / "logs").iterdir())


def test_no_process_survives_a_killed_launcher(start: Start, cluster: ServiceHarness, home: Path) -> None:
    launcher = start("--port", "0", "--api-workers", "2", engine=("--hold", "5"))
    address(launcher)
    job = cluster.submit()
    eventually(lambda: cluster.job(job).step == 5, within=60, what="the engine runs")
    kill(launcher.pid)
    launcher.process.wait()
    eventually(lambda: nothing_is_left(home), what="nothing is left")
    cluster.close()


@pytest.mark.parametrize("loss", ["killed", pytest.param("socket_removed", marks=pytest.mark.slow)])
def test_broker_that_is_lost_loses_no_job_and_none_runs_twice(
    start: Start, cluster: ServiceHarness, home: Path, tmp_path: Path, loss: str
) -> None:
    gate = tmp_path / "gate"
    launcher = start(engine=("--hold", "5", "--gate", str(gate)))
    address(launcher)
    running, waiting = cluster.submit(), cluster.submit()
    eventually(lambda: cluster.job(running).step == 5, within=60, what="the engine runs")

    def broker() -> int:
        found = (pid for pid, command in processes_mentioning(str(home)).items() if "valkey-server" in command)
        return next(found, 0)

    before = broker()
    if loss == "killed":
        kill(before)
    else:
        # As those do that clean up temporary directories.
        (home / "run" / "redis.sock").unlink()
    eventually(lambda: broker() not in (0, before), within=60, what="another broker")
    gate.touch()
    later = cluster.submit()
    jobs = (running, waiting, later)

    def statuses() -> set[JobStatus]:
        return {cluster.job(job).status for job in jobs}

    eventually(lambda: statuses() == {JobStatus.SUCCEEDED}, within=90, what="the jobs")
    assert [len(cluster.attempts(job)) for job in jobs] == [1, 1, 1]
    cluster.close()


def test_workers_share_the_machine_and_further_ones_join(
    start: Start, cluster: ServiceHarness, processes: Processes, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    hold = ("--hold", "5", "--gate", str(gate))
    address(start("--port", "0", "--job-workers", "2", engine=hold))
    # From another terminal, with the same POCL_HOME.
    joined = processes.start("run", cluster.environment(*hold))
    jobs = [cluster.submit() for _ in range(3)]
    eventually(lambda: [cluster.job(job).step for job in jobs] == [5] * 3, within=60, what="three jobs run at once")
    owners = {attempt.worker for job in jobs for attempt in cluster.attempts(job)}
    assert len(owners) == 3
    assert any(owner.endswith(f"-{joined.pid}") for owner in owners)
    with cluster.database.transaction(write=False) as session:
        memory = sorted(int(worker.devices[0]["memory_bytes"]) for worker in list_workers(session, limit=10).rows)
    assert memory[0] == memory[1] == memory[2] // 2
    gate.touch()
    eventually(lambda: {cluster.job(job).status for job in jobs} == {JobStatus.SUCCEEDED}, within=60, what="the end")
    cluster.close()


@pytest.mark.parametrize("part", ["api serve", "worker scheduler", "worker run"])
def test_killed_process_is_restarted(start: Start, home: Path, part: str) -> None:
    launcher = start()
    address(launcher)

    def running() -> set[int]:
        # Not the child that a worker forks, which shares its command line.
        alike = {pid for pid, command in processes_mentioning(str(home)).items() if f"-m {part}" in command}
        return {pid for pid in alike if parent_of(pid) == launcher.pid}

    (before,) = eventually(running)
    kill(before)
    eventually(lambda: running() - {before}, within=60, what="another one")


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def test_process_that_keeps_exiting_stops_the_service(start: Start, home: Path) -> None:
    launcher = start(POCL_REDIS_SERVER="/bin/false")
    assert launcher.wait_for_exit() == 1
    assert "The broker ended 4 times" in launcher.log
    assert launcher.log.count(f'"log": "{home}/logs/broker.log"') == 4
    assert nothing_is_left(home)


def test_home_in_use_is_refused(start: Start) -> None:
    address(start())
    second = start()
    assert second.wait_for_exit() == 1
    assert "choose another POCL_HOME" in second.log


def test_more_workers_than_fit_and_a_worker_without_a_service_are_refused(
    start: Start, cluster: ServiceHarness, processes: Processes
) -> None:
    launcher = start("--port", "0", "--job-workers", "64")
    alone = processes.start("run", cluster.environment())
    assert (launcher.wait_for_exit(), alone.wait_for_exit()) == (1, 1)
    assert "64 workers on the CPU need a processor each" in launcher.log
    assert "run `python -m worker serve`" in alone.log


def test_port_in_use_is_refused(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        launcher = start("--port", str(taken.getsockname()[1]))
        assert launcher.wait_for_exit() == 1
    assert "Choose another with --port" in launcher.log


def test_invalid_setting_is_named_without_its_value(start: Start) -> None:
    launcher = start(POCL_API_KEY="short-secret")
    assert launcher.wait_for_exit() == 2
    assert "POCL_API_KEY" in launcher.log
    assert "short-secret" not in launcher.log


def test_directories_are_private_to_their_owner_and_the_key_may_be_in_a_file(
    start: Start, home: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("a-key-of-decent-length\n")
    served = address(start(POCL_API_KEY="", POCL_API_KEY_FILE=str(key)))
    request = urllib.request.Request(f"{served}/v1/jobs", headers={"authorization": "Bearer a-key-of-decent-length"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
    assert [oct(os.stat(home / name).st_mode & 0o077) for name in (".", "run", "tmp")] == ["0o0"] * 3


def test_long_home_path_does_not_break_the_socket(processes: Processes, tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30) / "home"
    cluster = ServiceHarness(home, f"sqlite:///{home / 'pocl.sqlite3'}", heartbeat_seconds=0.5)
    home.parent.mkdir()
    launcher = processes.start("serve", cluster.environment(), "--port", "0")
    assert alive(address(launcher))
