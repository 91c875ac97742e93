"""The service in this process, over a real database."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.testclient import TestClient

from api.app import create_app
from domain.db import Database
from domain.local_key import make_local_key
from domain.settings import Settings
from tests.support.requests import AUTHORIZED, KEY, LOOPBACK, upload


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    # Nothing is encoded, which needs processes; test_preview.py does.
    return Settings(
        home=home,
        database_url=database_url,
        api_key=SecretStr(KEY),
        max_upload_bytes=64 * 1024,
        encoding_check_seconds=0,
    )


@pytest.fixture
def app(settings: Settings) -> Iterator[FastAPI]:
    app = create_app(settings)
    yield app
    app.state.database.close()


@pytest.fixture
def other_app(app: FastAPI, settings: Settings) -> Iterator[FastAPI]:
    """The service of a second process, as it were, over the same database."""
    del app  # The fixture has made the schema.
    other = create_app(settings)
    yield other
    other.state.database.close()


@pytest.fixture
def database(app: FastAPI) -> Database:
    database: Database = app.state.database
    return database


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """A client of the service; what fails inside is answered as a client would see it."""
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, headers=AUTHORIZED) as client:
        yield client


@pytest.fixture
def dataset(client: TestClient) -> str:
    """The id of a data set of eight rows."""
    return upload(client, rows=8)


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[TestClient]:
    """A service with the key of its first start, whose database has no schema: for what needs none."""
    settings = Settings(home=tmp_path / "bare")
    settings.home.mkdir(mode=0o700)
    headers = {"authorization": f"Bearer {make_local_key(settings.home)}"}
    with TestClient(create_app(settings), base_url=LOOPBACK, raise_server_exceptions=False, headers=headers) as client:
        yield client
