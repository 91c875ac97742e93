"""Keys: taken by one, for a bounded time, and waited for no longer than is bearable."""

from threading import Thread

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from domain.db import Base, Database, db_now
from domain.idempotency import repository
from domain.idempotency.models import MAX_BODY_BYTES, IdempotencyKey
from domain.idempotency.repository import IN_PROGRESS, KeyHolder, StoredKey, StoredResponse

FIRST, SECOND = KeyHolder("default", "key", "first"), KeyHolder("default", "key", "second")
RESPONSE = StoredResponse(201, "application/json", "/v1/jobs/job_1", b'{"id": "job_1"}')


def claim(database: Database, holder: KeyHolder, seconds: float = 60) -> StoredKey | None:
    with database.transaction(write=True) as session:
        return repository.claim(session.connection(), holder, fingerprint="asked", seconds=seconds)


def settle(database: Database, holder: KeyHolder) -> bool:
    with database.transaction(write=True) as session:
        return repository.settle(session.connection(), holder, fingerprint="asked", response=RESPONSE)


def test_a_key_is_claimed_once_and_its_response_replayed(database: Database) -> None:
    assert claim(database, FIRST) is None
    assert claim(database, SECOND) == StoredKey("asked", None)
    assert settle(database, FIRST)
    assert claim(database, SECOND) == StoredKey("asked", RESPONSE)
    with database.transaction(write=False) as session:
        assert repository.find(session.connection(), SECOND) == StoredKey("asked", RESPONSE)


def test_keys_of_two_projects_are_independent(database: Database) -> None:
    assert claim(database, FIRST) is None
    assert claim(database, KeyHolder("other", "key", "x")) is None


def test_an_expired_key_is_free_and_lost_to_its_holder(database: Database) -> None:
    assert claim(database, FIRST, seconds=0) is None
    with database.transaction(write=False) as session:
        assert repository.find(session.connection(), SECOND) is None
    assert claim(database, SECOND) is None
    assert not settle(database, FIRST)
    with database.transaction(write=True) as session:
        assert not repository.extend(session.connection(), FIRST, seconds=60)
        repository.release(session.connection(), FIRST)
    assert settle(database, SECOND)


def test_a_stored_response_is_neither_released_nor_changed(database: Database) -> None:
    claim(database, FIRST)
    settle(database, FIRST)
    with database.transaction(write=True) as session:
        repository.release(session.connection(), FIRST)
    assert not settle(database, FIRST)
    assert claim(database, SECOND) == StoredKey("asked", RESPONSE)


def test_only_expired_keys_are_deleted(database: Database) -> None:
    claim(database, FIRST, seconds=0)
    claim(database, KeyHolder("default", "another", "x"))
    with database.transaction(write=True) as session:
        assert repository.delete_expired(session.connection()) == 1
        assert session.scalars(sa.select(IdempotencyKey.key)).all() == ["another"]


def test_a_response_is_stored_for_a_day_by_the_databases_clock(database: Database) -> None:
    claim(database, FIRST)
    settle(database, FIRST)
    with database.transaction(write=False) as session:
        row = session.scalars(sa.select(IdempotencyKey)).one()
        now = session.scalars(sa.select(db_now())).one()
    assert abs((row.expires_at - now).total_seconds() - 24 * 3600) < 60


def test_the_body_of_a_stored_response_is_bounded(database: Database) -> None:
    claim(database, FIRST)
    large = StoredResponse(201, "application/json", None, b" " * (MAX_BODY_BYTES + 1))
    with pytest.raises(IntegrityError), database.transaction(write=True) as session:
        repository.settle(session.connection(), FIRST, fingerprint="asked", response=large)


def test_a_duplicate_gets_the_answer_of_the_transaction_that_it_waited_for(database: Database) -> None:
    results: list[StoredKey | None] = []
    second = Thread(target=lambda: results.append(claim(database, SECOND)))
    with database.transaction(write=True) as session:
        assert repository.claim(session.connection(), FIRST, fingerprint="asked", seconds=60) is None
        second.start()
        repository.settle(session.connection(), FIRST, fingerprint="asked", response=RESPONSE)
    second.join()
    assert results == [StoredKey("asked", RESPONSE)]


def test_a_duplicate_takes_the_key_of_a_transaction_that_failed(database: Database) -> None:
    results: list[StoredKey | None] = []
    second = Thread(target=lambda: results.append(claim(database, SECOND)))
    with database.transaction(write=True) as session:
        assert repository.claim(session.connection(), FIRST, fingerprint="asked", seconds=60) is None
        second.start()
        session.rollback()
    second.join()
    assert results == [None]


def test_a_duplicate_waits_for_the_lock_timeout_at_most(postgres_server: str) -> None:
    # On PostgreSQL alone: SQLite has one writer at a time, for whom everybody waits, as long as busy_timeout says.
    database = Database(postgres_server)
    schema = Base.metadata.tables["idempotency_keys"]
    schema.create(database.engine)
    try:
        with database.transaction(write=True) as first, database.transaction(write=True) as second:
            assert repository.claim(first.connection(), FIRST, fingerprint="asked", seconds=60) is None
            waited = repository.claim(second.connection(), SECOND, fingerprint="asked", seconds=60, wait_seconds=0.05)
            second.rollback()
        assert waited is IN_PROGRESS
    finally:
        schema.drop(database.engine)
        database.close()
