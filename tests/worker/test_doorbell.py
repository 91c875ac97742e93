"""The doorbell on a real broker: counted, topped up, harmless when the broker is gone."""

from pathlib import Path

import pytest
import redis

from worker.app import celery_app
from worker.doorbell import BrokerUnreachable, Doorbell


def test_it_is_topped_up_to_one_ring_a_job_and_no_further(redis_url: str) -> None:
    bell = Doorbell(celery_app(redis_url, "test"))
    assert [bell.ring_for(queued, limit=4) for queued in (0, 2, 2, 3, 9, 9)] == [0, 2, 0, 1, 1, 0]
    assert bell.waiting() == 4


def test_lost_rings_are_rung_again(redis_url: str) -> None:
    bell = Doorbell(celery_app(redis_url, "test"))
    bell.ring_for(2, limit=64)
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    assert bell.ring_for(2, limit=64) == 2


def test_queues_of_two_services_do_not_mix(redis_url: str) -> None:
    first, second = (Doorbell(celery_app(redis_url, name)) for name in ("one", "two"))
    first.ring()
    assert (first.waiting(), second.waiting()) == (1, 0)


def test_a_ring_carries_nothing(redis_url: str) -> None:
    Doorbell(celery_app(redis_url, "test")).ring()
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        message = str(client.lindex("test", 0))
    assert '"W1tdLCB7fSwg' in message  # base 64 of [[], {}, ...


def test_a_broker_that_is_gone_is_an_error_of_its_own(tmp_path: Path) -> None:
    bell = Doorbell(celery_app(f"unix://{tmp_path}/none.sock", "test"))
    with pytest.raises(BrokerUnreachable):
        bell.ring_for(1, limit=64)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("redis://host:1/2", "redis://host:1/2"),
        ("unix:///run/x.sock", "redis+socket:///run/x.sock?virtual_host=0"),
        ("unix:///run/x.sock?db=3", "redis+socket:///run/x.sock?virtual_host=3"),
    ],
)
def test_one_spelling_of_the_address_serves_celery_too(given: str, expected: str) -> None:
    assert celery_app(given, "test").conf.broker_url == expected
