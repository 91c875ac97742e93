"""The service in this process, over SQLite: the client's laws are the same with any database."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.testclient import TestClient

from api.app import create_app
from domain.db import Database
from domain.settings import Settings
from tests.support.requests import AUTHORIZED, KEY, LOOPBACK, upload


@pytest.fixture
def app(sqlite_template: Path, tmp_path: Path) -> Iterator[FastAPI]:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.copy(sqlite_template, tmp_path / "service.db")
    # Nothing is encoded, which needs processes.
    settings = Settings(
        home=home,
        database_url=f"sqlite:///{tmp_path / 'service.db'}",
        api_key=SecretStr(KEY),
        sync_upload_bytes=20_000,
        encoding_check_seconds=0,
    )
    app = create_app(settings)
    yield app
    app.state.database.close()


@pytest.fixture
def database(app: FastAPI) -> Database:
    database: Database = app.state.database
    return database


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """A plain client of the service, whose transport the package's client borrows."""
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, headers=AUTHORIZED) as client:
        yield client


@pytest.fixture
def dataset(client: TestClient) -> str:
    """The id of a data set of eight rows."""
    return upload(client, rows=8)
