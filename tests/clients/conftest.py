"""A service on a real socket, whose jobs the fake engine runs."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from api.app import create_app
from api.http_limits import ConnectionLimits
from domain.local_key import make_local_key
from tests.support.harness import ServiceHarness
from tests.support.http_server import http_server
from tests.support.waiting import eventually

Result = TypeVar("Result")


@dataclass(frozen=True)
class Service:
    """Where clients reach the service."""

    harness: ServiceHarness
    address: str
    key: str

    def serve(self, client: Callable[[], Result]) -> Result:
        """What a client returns that runs beside a worker, which does the jobs that it submits.

        Raises:
            Exception: whatever the client raises.
        """
        supervisor = self.harness.supervisor()
        with ThreadPoolExecutor(1) as beside:
            outcome = beside.submit(client)
            # A supervisor needs the main thread.
            eventually(lambda: outcome.done() or [supervisor.work_one()] == [], within=120, what="the client is done")
            return outcome.result()


@pytest.fixture
def service(sqlite_template: Path, tmp_path: Path) -> Iterator[Service]:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "pocl.sqlite3").write_bytes(sqlite_template.read_bytes())
    harness = ServiceHarness(home, f"sqlite:///{home / 'pocl.sqlite3'}")
    key = make_local_key(home)
    app = create_app(harness.settings.model_copy(update={"encoding_check_seconds": 0}))
    with http_server(app, ConnectionLimits(max_connections=64)) as server:
        yield Service(harness, f"http://127.0.0.1:{server.port}", key)
    harness.close()
