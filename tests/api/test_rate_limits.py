"""Rate limits that several processes share: counted together over Redis, and apart while it does not answer."""

import asyncio
from contextlib import AbstractContextManager
from pathlib import Path

import httpx2
import pytest
import redis

from api.problems import RateLimited
from api.rate_limits import RequestRates
from tests.support.api_process import ServiceProcess, serving
from tests.support.requests import AUTHORIZED

LIMIT = 5


def refusals(*rates: RequestRates, key: str = "key", requests: int = 8) -> list[RateLimited]:
    """Send so many requests of a key to each process in turn; the refusals."""

    async def send() -> list[RateLimited]:
        refused = []
        for _ in range(requests):
            for each in rates:
                try:
                    await each.admit(key)
                except RateLimited as error:
                    refused.append(error)
        return refused

    return asyncio.run(send())


def test_processes_that_share_a_redis_admit_together_what_one_may(redis_url: str) -> None:
    processes = [RequestRates(LIMIT, redis_url) for _ in range(2)]
    refused = refusals(*processes)
    assert len(refused) == 2 * 8 - LIMIT
    assert all(1 <= int(dict(each.headers)["Retry-After"]) <= 60 for each in refused)
    # Another key has its own count, and a process that comes later knows of both.
    later = RequestRates(LIMIT, redis_url)
    assert len(refusals(later, key="other", requests=LIMIT)) == 0
    assert len(refusals(later, *processes, requests=1)) == 3


def test_a_refusal_says_when_the_window_that_all_share_ends(redis_url: str) -> None:
    assert refusals(RequestRates(LIMIT, redis_url), requests=LIMIT) == []
    server = redis.Redis.from_url(redis_url)
    (counted,) = server.keys("*")
    server.expire(counted, 7)
    (refused,) = refusals(RequestRates(LIMIT, redis_url), requests=1)
    assert int(dict(refused.headers)["Retry-After"]) in (6, 7)
    assert dict(refused.headers)["RateLimit"] == f'"key";r=0;t={dict(refused.headers)["Retry-After"]}'
    server.close()


def test_each_process_counts_for_itself_while_redis_does_not_answer(tmp_path: Path) -> None:
    processes = [RequestRates(LIMIT, f"unix://{tmp_path}/none.sock") for _ in range(2)]
    assert len(refusals(*processes)) == 2 * (8 - LIMIT)


@pytest.mark.slow
def test_two_services_refuse_together(database_url: str, redis_url: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)

    def service(name: str) -> AbstractContextManager[ServiceProcess]:
        log, limit = tmp_path / name, str(LIMIT)
        return serving(home, log, database_url=database_url, requests_per_minute=limit, rate_limit_redis_url=redis_url)

    with (
        service("one") as first,
        service("two") as second,
        httpx2.Client(headers=AUTHORIZED, verify=False) as client,
    ):
        answers = [client.get(f"{each.address}/v1/jobs").status_code for _ in range(LIMIT) for each in (first, second)]
    assert sorted(answers) == [200] * LIMIT + [429] * LIMIT
