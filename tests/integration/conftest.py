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


@pytest.fixture
def harness(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[ServiceHarness]:
    """A harness with leases so short that a lost worker is noticed within the test."""
    harness = ServiceHarness(tmp_path / "home", database_url, lease_seconds=3, redis_url=redis_url)
    yield harness
    harness.close()


@pytest.fixture
def cluster(harness: ServiceHarness, processes: Processes, queue: str, gate: Path) -> ClusterHarness:
    assert harness.database is not None
    return ClusterHarness(harness, processes, queue, gate)
