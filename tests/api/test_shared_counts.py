"""Counts of requests that processes share."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from limits import RateLimitItemPerMinute
from limits.strategies import FixedWindowRateLimiter

from api.shared_counts import SharedCounts
from tests.support.waiting import eventually


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its id."""
    pid = os.fork()
    if pid:
        return pid
    with suppress(BaseException):
        work()
        os._exit(0)
    os._exit(1)


@pytest.mark.system
def test_limit_holds_for_all_processes_together() -> None:
    counts, admitted = SharedCounts(lock_seconds=60), SharedCounts(lock_seconds=60)
    item = RateLimitItemPerMinute(1000)

    def send() -> None:
        limiter = FixedWindowRateLimiter(counts)
        for _ in range(400):
            if limiter.hit(item, "key"):
                admitted.incr("admitted", 3600)

    children = [fork(send) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert counts.get(item.key_for("key")) == 1600
    assert admitted.get("admitted") == 1000


@pytest.mark.system
def test_lock_of_a_killed_process_is_free_and_that_of_a_frozen_one_delays_nobody_for_long() -> None:
    counts, ready = SharedCounts(), SharedCounts()

    def freeze() -> None:
        with counts._locked():
            ready.incr("ready", 3600)
            signal.pause()

    child = fork(freeze)
    eventually(lambda: ready.get("ready") == 1, what="the lock is held")
    with pytest.raises(TimeoutError):
        counts.incr("key", 60)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert counts.incr("key", 60) == 1


def test_full_table_forgets_the_window_that_ends_first_and_no_other() -> None:
    counts = SharedCounts(entries=8)
    for number in range(8):
        counts.incr(f"key-{number}", expiry=100 + number, amount=number + 1)
    counts.incr("one more", expiry=500)
    assert [counts.get(f"key-{number}") for number in range(8)] == [0, 2, 3, 4, 5, 6, 7, 8]
    assert counts.get("one more") == 1


def test_window_that_has_ended_begins_anew() -> None:
    counts = SharedCounts()
    counts.incr("key", expiry=0, amount=5)
    assert counts.get("key") == 0
    assert counts.incr("key", expiry=60) == 1
    assert counts.get_expiry("key") > time.time()
    counts.clear("key")
    assert counts.get("key") == 0
    counts.incr("key", expiry=60)
    counts.reset()
    assert counts.get("key") == 0
