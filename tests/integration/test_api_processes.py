"""Several processes of the API on one socket: what they share, and what becomes of clients when one dies."""

import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.api_process import ROOT, ServiceProcess, environment, serving
from tests.support.cluster import children_of
from tests.support.harness import ServiceHarness, kill
from tests.support.processes import ignores, terminal_signals
from tests.support.requests import AUTHORIZED, KEY
from tests.support.waiting import eventually

pytestmark = pytest.mark.system

PROGRAM = ("-P", "-m", "api", "serve", "--workers", "2")


@dataclass(frozen=True)
class Service:
    """A service of two processes, and the parent of its rows."""

    process: ServiceProcess
    harness: ServiceHarness

    @property
    def pids(self) -> list[int]:
        return eventually(lambda: pids if len(pids := children_of(self.process.process.pid)) == 2 else [])

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.process.address.removeprefix("http://"), timeout=60)
        connection.connect()
        return connection

    def connect_to(self, pid: int, count: int = 1) -> list[http.client.HTTPConnection]:
        """Connections that this process has accepted: the other one is frozen meanwhile."""
        (other,) = set(self.pids) - {pid}
        kill(other, signal.SIGSTOP)
        try:
            connections = [self.connect() for _ in range(count)]
            # A connection is known to be accepted once something was answered on it.
            assert [get(each, "/healthz").status for each in connections] == [200] * count
        finally:
            kill(other, signal.SIGCONT)
        return connections


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes


def get(connection: http.client.HTTPConnection, path: str, key: str = KEY) -> Answer:
    connection.request("GET", path, headers={"authorization": f"Bearer {key}"})
    response = connection.getresponse()
    return Answer(response.status, response.read())


@contextmanager
def running(template: Path, place: Path, on_terminal: signal.Handlers, per_minute: int = 600_000) -> Iterator[Service]:
    home = place / "home"
    home.mkdir(mode=0o700)
    shutil.copyfile(template, home / "pocl.sqlite3")
    harness = ServiceHarness(home, f"sqlite:///{home / 'pocl.sqlite3'}")
    with ExitStack() as stack:
        stack.callback(harness.close)
        with terminal_signals(on_terminal):
            process = stack.enter_context(
                serving(home, place / "log", program=PROGRAM, requests_per_minute=str(per_minute))
            )
        yield Service(process, harness)


@pytest.fixture(scope="module")
def service(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    place = tmp_path_factory.mktemp("service")
    with running(sqlite_template, place, signal.SIG_IGN, per_minute=900) as service:
        yield service


def test_killed_process_takes_no_request_of_another_along_and_is_replaced(service: Service) -> None:
    job = service.harness.submit()
    dying, staying = service.pids
    with ExitStack() as stack:
        connections = service.connect_to(staying, 4)
        lost = service.connect_to(dying)
        for connection in (*connections, *lost):
            stack.callback(connection.close)
        follower, *clients = connections
        follower.request("GET", f"/v1/jobs/{job}/events/stream", headers=AUTHORIZED)
        stream = follower.getresponse()
        assert b"queued" in read_until(stream, b"\n\n")
        statuses: list[int] = []
        goes_on = threading.Event()

        def poll(connection: http.client.HTTPConnection) -> None:
            for _ in range(40):
                statuses.append(get(connection, f"/v1/jobs/{job}").status)
            goes_on.set()
            for _ in range(40):
                statuses.append(get(connection, f"/v1/jobs/{job}").status)

        threads = [threading.Thread(target=poll, args=[client]) for client in clients]
        for thread in threads:
            thread.start()
        assert goes_on.wait(60)
        kill(dying)
        # New connections are accepted all the while.
        for _ in range(20):
            fresh = service.connect()
            statuses.append(get(fresh, "/healthz").status)
            fresh.close()
        for thread in threads:
            thread.join()
        assert statuses == [200] * (len(clients) * 80 + 20)
        eventually(lambda: dying not in service.pids and staying in service.pids, what="it is replaced")
        (new,) = set(service.pids) - {staying}
        stack.callback((replaced := service.connect_to(new)[0]).close)
        # The stream of the process that stayed tells what happens by way of the new one.
        replaced.request("POST", f"/v1/jobs/{job}/cancel", headers=AUTHORIZED)
        assert replaced.getresponse().status == 202
        assert b"cancelled" in read_until(stream, b"event: end")


def read_until(stream: http.client.HTTPResponse, end: bytes) -> bytes:
    """What a stream sends until this comes."""
    received = b""
    while end not in received:
        piece = stream.read1(65536)
        assert piece, received
        received += piece
    return received


def test_terminal_goes_on_being_ignored(service: Service) -> None:
    before = service.pids
    for pid in (service.process.process.pid, *before):
        kill(pid, signal.SIGHUP)
        kill(pid, signal.SIGINT)
    for pid in before:
        service.connect_to(pid)[0].close()
    assert service.pids == before


def test_terminal_goes_on_being_ignored_by_a_process_that_is_alone(sqlite_template: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o700)
    shutil.copyfile(sqlite_template, tmp_path / "home" / "pocl.sqlite3")
    with ExitStack() as stack:
        with terminal_signals(signal.SIG_IGN):
            service = stack.enter_context(serving(tmp_path / "home", tmp_path / "log"))
        assert ignores(service.process.pid, signal.SIGHUP, signal.SIGINT)


def test_key_is_refused_by_each_process_once_it_is_revoked(service: Service) -> None:
    made = keys_command(service, "create", "--scope", "read")
    token, key_id = made.stdout.strip(), made.stderr.partition(":")[0]
    connections = [service.connect_to(pid)[0] for pid in service.pids]
    assert [get(each, "/v1/workers", token).status for each in connections] == [200, 200]
    keys_command(service, "revoke", key_id)
    for connection in connections:
        eventually(partial(is_refused, connection, token), every=0.5, what="the key is refused")
    assert [get(each, "/v1/workers", token).status for each in connections] == [401, 401]
    for connection in connections:
        connection.close()


def is_refused(connection: http.client.HTTPConnection, key: str) -> bool:
    return get(connection, "/v1/workers", key).status == 401


def keys_command(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = environment(service.harness.home)
    command = [sys.executable, "-P", "-m", "api", "keys", *arguments]
    return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=True)


def test_each_process_tells_the_requests_of_all(service: Service) -> None:
    connections = [service.connect_to(pid)[0] for pid in service.pids]
    before = counted(connections[0])
    for connection in connections:
        for _ in range(3):
            get(connection, "/v1/presets")
    # A request is counted once its answer is sent: its client may be faster.
    eventually(
        lambda: all(counted(each) - before == 6 for each in connections), what="each process tells all six requests"
    )
    for connection in connections:
        connection.close()


def counted(connection: http.client.HTTPConnection) -> float:
    families = text_string_to_metric_families(get(connection, "/metrics").body.decode())
    samples = [sample for family in families for sample in family.samples]
    assert [sample.value for sample in samples if sample.name == "pocl_api_processes"] == [2]
    return sum(
        sample.value
        for sample in samples
        if sample.name == "pocl_http_request_duration_seconds_count" and sample.labels["route"] == "/v1/presets"
    )


def test_rate_limit_holds_for_all_processes_together(service: Service) -> None:
    key = keys_command(service, "create", "--scope", "read").stdout.strip()
    connections = [service.connect_to(pid)[0] for pid in service.pids]
    statuses = [get(connection, "/v1/methods", key).status for _ in range(451) for connection in connections]
    assert sorted(set(statuses)) == [200, 429]
    # A minute that ends meanwhile admits as many once more.
    assert statuses.count(200) in range(900, 902)
    for connection in connections:
        connection.close()


def test_requests_under_way_are_answered_before_all_processes_stop(sqlite_template: Path, tmp_path: Path) -> None:
    with running(sqlite_template, tmp_path, signal.SIG_DFL) as service:
        job = service.harness.submit()
        waiting = [service.connect_to(pid)[0] for pid in service.pids]
        for connection in waiting:
            connection.request("GET", f"/v1/jobs/{job}?wait=30", headers=AUTHORIZED)
        eventually(lambda: followers(service) == 2, what="both wait")
        # A closed terminal that nobody has it ignore is a request to end, as SIGTERM is.
        service.process.process.send_signal(signal.SIGHUP)
        answers = [connection.getresponse() for connection in waiting]
        assert [(answer.status, json.loads(answer.read())["id"]) for answer in answers] == [(200, job)] * 2
        for connection in waiting:
            connection.close()
        assert service.process.process.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            service.connect()


def followers(service: Service) -> float:
    connection = service.connect()
    families = text_string_to_metric_families(get(connection, "/metrics").body.decode())
    connection.close()
    return sum(sample.value for family in families for sample in family.samples if sample.name == "pocl_http_followers")
