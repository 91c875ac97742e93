"""Limits that are counted before a row is added: of many that want the last places at once no more get one."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy.orm import Session

from domain.db import Database
from domain.errors import ApiError
from domain.jobs.quotas import admit_job
from domain.keys.models import ApiKey
from domain.keys.repository import MAX_KEYS, create_key
from domain.settings import Settings
from domain.webhooks.repository import MAX_ENDPOINTS, add_endpoint
from tests.support.rows import add_job

ATTEMPTS = 8
PLACES = 2


class Limit(NamedTuple):
    fill: Callable[[Session], object]
    """Leaves `PLACES` places."""
    add: Callable[[Session, Settings], object]


def add_webhook(session: Session, _settings: Settings | None = None) -> None:
    add_endpoint(session, project="default", url="https://hooks.example/", description="", events=None, labels={})


def fill_webhooks(session: Session) -> None:
    for _ in range(MAX_ENDPOINTS - PLACES):
        add_webhook(session)


def fill_keys(session: Session) -> None:
    for number in range(MAX_KEYS - PLACES):
        session.add(
            ApiKey(id=f"key_{number}", project="default", name="k", scopes=["read"], token_sha256=f"{number:064}")
        )


def add_queued_job(session: Session, settings: Settings) -> None:
    admit_job(session, settings, "default")
    add_job(session)


LIMITS = {
    "webhooks": Limit(fill_webhooks, add_webhook),
    "keys": Limit(fill_keys, lambda session, _: create_key(session, project="default", name="k", scopes=["read"])),
    "queued jobs": Limit(lambda _: None, add_queued_job),
}


@pytest.mark.parametrize("name", list(LIMITS))
def test_the_last_places_are_given_once(database: Database, tmp_path: Path, name: str) -> None:
    limit = LIMITS[name]
    settings = Settings(home=tmp_path, max_jobs_queued=PLACES)
    with database.transaction(write=True) as session:
        limit.fill(session)

    def is_added(_number: int) -> bool:
        try:
            with database.transaction(write=True) as session:
                limit.add(session, settings)
        except ApiError:
            return False
        return True

    with ThreadPoolExecutor(ATTEMPTS) as pool:
        assert sum(pool.map(is_added, range(ATTEMPTS))) == PLACES
