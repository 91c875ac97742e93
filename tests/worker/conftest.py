from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import Workshop


@pytest.fixture
def workshop(database_url: str, tmp_path: Path) -> Iterator[Workshop]:
    """On SQLite and on PostgreSQL."""
    made = Workshop(tmp_path / "home", database_url)
    yield made
    made.close()
