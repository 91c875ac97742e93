import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Shop
from tests.support.harness import Workshop
from tests.support.processes import Crew


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file at whose sight a held engine goes on."""
    return tmp_path / "gate"


@pytest.fixture
def queue() -> str:
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def workshop(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Workshop]:
    """With leases so short that a lost worker is noticed within the test."""
    made = Workshop(tmp_path / "home", database_url, lease_seconds=3, redis_url=redis_url)
    yield made
    made.close()


@pytest.fixture
def shop(workshop: Workshop, crew: Crew, queue: str, gate: Path) -> Shop:
    assert workshop.database is not None
    return Shop(workshop, crew, queue, gate)
