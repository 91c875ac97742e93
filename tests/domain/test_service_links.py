"""Variables that Kubernetes sets for services named `pocl` are told from settings by their form."""

import pytest
from structlog.testing import capture_logs

from domain.service_links import is_service_link, log_service_links, service_links
from domain.settings import Settings

LINKS = {
    "POCL_SERVICE_HOST": "10.3.0.7",
    "POCL_SERVICE_PORT": "8000",
    "POCL_SERVICE_PORT_HTTP": "8000",
    "POCL_PORT": "tcp://10.3.0.7:8000",
    "POCL_PORT_8000_TCP": "tcp://10.3.0.7:8000",
    "POCL_PORT_8000_TCP_PROTO": "tcp",
    "POCL_PORT_8000_TCP_PORT": "8000",
    "POCL_PORT_8000_TCP_ADDR": "10.3.0.7",
    "POCL_WORKER_PORT": "tcp://[2001:db8::7]:8000",
    "POCL_WORKER_SERVICE_HOST": "10.3.0.8",
    "POCL_REDIS_PORT_6379_TCP_ADDR": "10.3.0.9",
}
SETTINGS = {"POCL_PORT": "8000", "POCL_HOST": "10.3.0.7", "POCL_REDIS_URL": "redis://10.3.0.9", "PORT": "tcp://x:1"}


def test_links_are_told_from_settings() -> None:
    assert service_links(LINKS) == sorted(LINKS)
    assert service_links(SETTINGS) == []


@pytest.mark.parametrize("value", ["tcp:/10.3.0.7", "http://10.3.0.7:8000", "tcp", ""])
def test_a_port_of_another_form_is_a_setting(value: str) -> None:
    assert not is_service_link("POCL_PORT", value)


def test_what_is_ignored_is_logged() -> None:
    with capture_logs() as logged:
        log_service_links(LINKS | SETTINGS | {"POCL_PORT": "8000"})
        log_service_links(SETTINGS)
    (line,) = logged
    assert line["variables"] == sorted(set(LINKS) - {"POCL_PORT"})


def test_links_set_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LINKS.items():
        monkeypatch.setenv(name, value)
    assert Settings().port == 8000
