"""The service in this process with objects and keys of three projects, and browsers that are logged in."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.testclient import TestClient

from api.app import create_app
from api.rate_limits import WrongKeyRates
from domain.db import Database
from domain.keys.models import Scope
from domain.keys.repository import create_key
from domain.settings import Settings
from tests.api.dashboard.browsers import Browser
from tests.api.http.test_roles import OWNER, STRANGER, make_objects
from tests.support.requests import KEY, LOOPBACK


@dataclass
class Dashboard:
    app: FastAPI
    client: TestClient
    database: Database
    settings: Settings
    ids: dict[str, str]
    """The ids of the objects of :data:`OWNER`, by the names of path parameters."""
    slowed: list[float]
    """The waits that wrong keys brought about, in seconds."""
    now: list[float] = field(default_factory=lambda: [0.0])
    """The monotonic time of the service, in its one entry."""

    def make_key(self, project: str = OWNER, scope: Scope = "submit") -> tuple[str, str]:
        """The id and the text of a new key."""
        with self.database.transaction(write=True) as session:
            key, token = create_key(session, project=project, name="browser", scopes=[scope])
            return key.id, str(token)

    def browser(self, project: str = OWNER, scope: Scope = "submit") -> Browser:
        """A browser that is logged in with a new key."""
        browser = Browser(self.client)
        response = browser.log_in(self.make_key(project, scope)[1])
        assert response.status_code == 303, response.text
        return browser


@pytest.fixture(scope="module")
def home_template(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A home with the objects of the owner, and their ids; every test has a copy."""
    home = tmp_path_factory.mktemp("dashboard")
    shutil.copyfile(sqlite_template, home / "pocl.sqlite3")
    settings = Settings(home=home, api_key=SecretStr(KEY))
    database = Database(settings.database_url)
    ids = make_objects(database, settings.artifact_root)
    database.close()
    return home, ids


@pytest.fixture
def start(home_template: tuple[Path, dict[str, str]], tmp_path: Path) -> Iterator[Callable[..., Dashboard]]:
    """Starts the service, with further settings."""
    started: list[Dashboard] = []

    def begin(**settings: object) -> Dashboard:
        home = tmp_path / "home"
        if not home.exists():
            shutil.copytree(home_template[0], home)
            home.chmod(0o700)
        made = Settings.model_validate(
            {"home": home, "api_key": SecretStr(KEY), "encoding_check_seconds": 0, **settings}
        )
        slowed: list[float] = []

        async def no_wait(seconds: float) -> None:
            slowed.append(seconds)

        now = [0.0]
        app = create_app(made, wrong_keys=WrongKeyRates(no_wait), clock=lambda: now[0])
        client = TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False)
        client.__enter__()
        dashboard = Dashboard(app, client, Database(made.database_url), made, home_template[1], slowed, now)
        started.append(dashboard)
        return dashboard

    yield begin
    for dashboard in started:
        dashboard.client.__exit__(None, None, None)
        dashboard.database.close()


@pytest.fixture
def dashboard(start: Callable[..., Dashboard]) -> Dashboard:
    return start()


__all__ = ["OWNER", "STRANGER"]
