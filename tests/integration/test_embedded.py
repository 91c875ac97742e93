"""`python -m worker serve`: everything under one command, and nothing left when it ends, however it ends."""

import os
import signal
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from domain.jobs.states import JobStatus
from tests.support.harness import ServiceHarness, kill, processes_mentioning
from tests.support.processes import Processes, ProcessHandle
from tests.support.waiting import eventually

Start = Callable[..., ProcessHandle]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def cluster(home: Path) -> ServiceHarness:
    return ServiceHarness(home, f"sqlite:///{home / 'pocl.sqlite3'}", lease_seconds=3)


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
    launcher = start()
    assert alive(address(launcher))
    assert len(processes_mentioning(str(home))) >= 5
    launcher.process.send_signal(number)
    assert launcher.wait_for_exit() == 0
    assert nothing_is_left(home)
    assert launcher.log.count("READY") == 1


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
    launcher = start(engine=("--hold", "5"))
    address(launcher)
    job = cluster.submit()
    eventually(lambda: cluster.job(job).step == 5, within=60, what="the engine runs")
    kill(launcher.pid)
    launcher.process.wait()
    eventually(lambda: nothing_is_left(home), what="nothing is left")
    cluster.close()


def test_job_succeeds_after_the_broker_died(start: Start, cluster: ServiceHarness, home: Path) -> None:
    launcher = start()
    address(launcher)
    first = cluster.submit()
    eventually(lambda: cluster.job(first).status is JobStatus.SUCCEEDED, within=60, what="the first job")
    (broker,) = (pid for pid, command in processes_mentioning(str(home)).items() if "valkey-server" in command)
    kill(broker)
    second = cluster.submit()
    eventually(lambda: cluster.job(second).status is JobStatus.SUCCEEDED, within=60, what="the second job")
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


def test_directories_are_private_to_their_owner(start: Start, home: Path) -> None:
    address(start())
    assert [oct(os.stat(home / name).st_mode & 0o077) for name in (".", "run", "tmp")] == ["0o0"] * 3


def test_long_home_path_does_not_break_the_socket(processes: Processes, tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30) / "home"
    cluster = ServiceHarness(home, f"sqlite:///{home / 'pocl.sqlite3'}", lease_seconds=3)
    home.parent.mkdir()
    launcher = processes.start("serve", cluster.environment(), "--port", "0")
    assert alive(address(launcher))
