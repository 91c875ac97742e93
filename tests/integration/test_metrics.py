"""Metrics of several API processes of one machine, on real sockets."""

import socket
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from domain.schema import upgrade
from domain.settings import Settings
from tests.support.api_process import serving
from tests.support.waiting import eventually

TOKEN = "a-token-for-scrapes-alone"


def scrape(address: str) -> dict[tuple[str, str], float]:
    """The number of requests by method and route, of refusals by reason, and of processes."""
    response = httpx2.get(f"{address}/metrics", headers={"authorization": f"Bearer {TOKEN}"}, verify=False)
    assert response.status_code == 200, response.text
    counted: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            if sample.name == "pocl_http_request_duration_seconds_count":
                key = sample.labels["method"], sample.labels["route"]
                counted[key] = counted.get(key, 0) + sample.value
            elif sample.name == "pocl_api_processes":
                counted["processes", ""] = sample.value
            elif sample.name == "pocl_http_refusals_total":
                counted["refused", sample.labels["reason"]] = sample.value
    return counted


def exchange(address: str, content: bytes) -> bytes:
    """Send what is no request; the beginning of what comes back."""
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 20) as connection:
        connection.sendall(content)
        return connection.recv(1000)


@pytest.mark.system
def test_any_of_several_processes_tells_the_requests_of_all(tmp_path: Path) -> None:
    home = tmp_path / "home"
    upgrade(Settings(home=home))
    route = ("GET", "/version")
    with serving(home, tmp_path / "first.log", metrics_token=TOKEN) as first:
        with serving(home, tmp_path / "second.log", expects_kill=True, metrics_token=TOKEN) as second:
            for address, requests in ((first.address, 3), (second.address, 4)):
                for _ in range(requests):
                    assert httpx2.get(f"{address}/version", verify=False).status_code == 200
            for process in (first, second):
                assert b" 431 " in exchange(process.address, b"GET / HTTP/1.1\r\nx: " + bytes([120]) * 100_000)
            # What a process holds now it writes once a second.
            eventually(lambda: scrape(first.address)["processes", ""] == 2, what="both processes are known")
            assert scrape(first.address)[route] == scrape(second.address)[route] == 7
            # The scrape of each process has written what it counts besides.
            second.process.kill()
            second.process.wait()
        alone = scrape(first.address)
        assert (alone[route], alone["processes", ""]) == (7, 1)
        assert alone["refused", "head_too_large"] == 2
