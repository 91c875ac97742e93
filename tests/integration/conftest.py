import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import ClusterHarness
from tests.support.harness import ServiceHarness
from tests.support.processes import Processes


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The file for which an engine that is started with `--hold` waits."""
    return tmp_path / "gate"


@pytest.fixture
def queue() -> str:
    return f"test-{uuid.uuid4().hex}"


SHORT_LEASE_SECONDS = 6
LONG_LEASE_SECONDS = 60


@pytest.fixture
def harness(
    database_url: str, redis_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[ServiceHarness]:
    """A harness whose processes notice each other within half a second.

    A lease outlasts any pause of a loaded machine, except in tests marked `short_lease`, where it ends within the test.
    """
    short = request.node.get_closest_marker("short_lease") is not None
    harness = ServiceHarness(
        tmp_path / "home",
        database_url,
        lease_seconds=SHORT_LEASE_SECONDS if short else LONG_LEASE_SECONDS,
        heartbeat_seconds=0.5,
        redis_url=redis_url,
    )
    yield harness
    harness.close()


@pytest.fixture
def cluster(harness: ServiceHarness, processes: Processes, queue: str, gate: Path) -> ClusterHarness:
    assert harness.database is not None
    return ClusterHarness(harness, processes, queue, gate)
