import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness import ServiceHarness


@pytest.fixture
def harness(sqlite_template: Path, tmp_path: Path) -> Iterator[ServiceHarness]:
    """On SQLite alone: `tests/domain/chat` holds what a session asks of the rows, on both databases."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.copyfile(sqlite_template, home / "pocl.sqlite3")
    harness = ServiceHarness(home, f"sqlite:///{home / 'pocl.sqlite3'}")
    yield harness
    harness.close()
