from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import ServiceHarness


@pytest.fixture
def harness(database_url: str, tmp_path: Path) -> Iterator[ServiceHarness]:
    """On SQLite and on PostgreSQL."""
    harness = ServiceHarness(tmp_path / "home", database_url)
    yield harness
    harness.close()
