"""A database without a schema, for tests of what makes one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from domain.connections import create_engine_for
from domain.settings import Settings


@pytest.fixture
def engine(empty_database_url: str) -> Iterator[sa.Engine]:
    engine = create_engine_for(empty_database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def settings(empty_database_url: str, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", database_url=empty_database_url)
