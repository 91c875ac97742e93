"""A database with the newest schema, for tests that need rows."""

from collections.abc import Iterator

import pytest

import api.checkpoints.models
import api.datasets.models
import api.idempotency.models
import api.jobs.models  # noqa: F401 - the four fill the metadata
from api.db import Database, Record


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An empty database with all tables; the test of the migrations shows that these are theirs."""
    database = Database(database_url)
    with database.engine.begin() as connection:
        Record.metadata.create_all(connection)
    yield database
    database.close()
