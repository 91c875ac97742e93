"""The doorbell on a real broker: rings are counted, topped up, and lost without harm."""

import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest
import redis

from tests.support.waiting import eventually
from worker import valkey
from worker.app import broker_url, celery_app
from worker.doorbell import BrokerUnreachable, Doorbell
from worker.processes import spawn, terminate


def test_one_ring_waits_for_each_queued_job_up_to_the_limit(redis_url: str) -> None:
    doorbell = Doorbell(celery_app(redis_url, "test"))
    assert [doorbell.ring_for(queued, limit=4) for queued in (0, 2, 2, 3, 9, 9)] == [0, 2, 0, 1, 1, 0]
    assert doorbell.waiting() == 4


def test_lost_rings_are_rung_again(redis_url: str) -> None:
    doorbell = Doorbell(celery_app(redis_url, "test"))
    doorbell.ring_for(2, limit=64)
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    assert doorbell.ring_for(2, limit=64) == 2


def test_two_services_on_one_broker_do_not_share_rings(redis_url: str) -> None:
    first, second = (Doorbell(celery_app(redis_url, name)) for name in ("one", "two"))
    first.ring()
    assert (first.waiting(), second.waiting()) == (1, 0)


def test_ring_has_no_arguments(redis_url: str) -> None:
    Doorbell(celery_app(redis_url, "test")).ring()
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        message = str(client.lindex("test", 0))
    assert '"W1tdLCB7fSwg' in message  # base 64 of [[], {}, ...


@pytest.mark.system
def test_unreachable_broker_raises_its_own_error(tmp_path: Path) -> None:
    doorbell = Doorbell(celery_app(f"unix://{tmp_path}/none.sock", "test"))
    with pytest.raises(BrokerUnreachable):
        doorbell.ring_for(1, limit=64)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://host:1/2", "redis://host:1/2"),
        ("redis://host:1?db=2", "redis://host:1/2"),
        ("redis://host:1/7?db=2", "redis://host:1/2"),
        ("redis://u:p%40%23%2F@[::1]:1", "redis://u:p%40%23%2F@[::1]:1/0"),
        ("unix:///run/a%2541%23%3F%3B%20x.sock", "redis+socket:///run/a%2541%23%3F%3B%20x.sock?virtual_host=0"),
        ("unix:///run/x.sock", "redis+socket:///run/x.sock?virtual_host=0"),
        ("unix:///run/x.sock?db=3", "redis+socket:///run/x.sock?virtual_host=3"),
    ],
)
def test_broker_url_is_translated_for_celery(url: str, expected: str) -> None:
    assert celery_app(url, "test").conf.broker_url == expected


@pytest.mark.system
def test_socket_of_any_path_and_any_database_are_reached_alike_by_all_clients() -> None:
    directory = Path(tempfile.mkdtemp(prefix="a %41#?;é@"))
    socket = directory / "redis.sock"
    with (directory / "log").open("wb") as log:
        server = spawn(valkey.command(valkey.find().path, socket), stdout=log)
    try:
        url = f"unix://{quote(str(socket))}?db=3"
        with redis.Redis.from_url(url) as client:
            eventually(lambda: socket.exists() and client.ping(), what="the server answers")
            Doorbell(celery_app(url, "test")).ring()
            assert client.llen("test") == 1
    finally:
        terminate(server, grace=0)
        shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://host:1?db=2", "redis://host:1?db=2"),
        ("redis://:pass%40@host:1/3", "redis://:pass%40@host:1/3"),
        ("unix:///run/x.sock?db=3", "unix:///run/x.sock?db=3"),
        (
            "rediss://host:1/0",
            "rediss://host:1/0?ssl_cert_reqs=required&ssl_check_hostname=true&ssl_ca_certs=%2Fca.pem",
        ),
        (
            "rediss://host?ssl_cert_reqs=none",
            "rediss://host?ssl_cert_reqs=none&ssl_check_hostname=false&ssl_ca_certs=%2Fca.pem",
        ),
    ],
)
def test_broker_behind_tls_is_verified_unless_its_address_says_otherwise(url: str, expected: str) -> None:
    assert broker_url(url, Path("/ca.pem")) == expected
    assert broker_url(expected, Path("/ca.pem")) == expected
