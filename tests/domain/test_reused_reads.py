"""Reads that cost much are used again for a multiple of their cost, and small ones never."""

from collections.abc import Callable

import pytest

from domain.reused_reads import REUSE_FACTOR, ReusedRead


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def reading(clock: Clock, size: int) -> Callable[[], list[int]]:
    """A read that takes a second."""

    def read() -> list[int]:
        clock.now += 1
        return [0] * size

    return read


def test_a_large_value_is_read_a_twentieth_of_the_time() -> None:
    clock = Clock()
    reused: ReusedRead[list[int]] = ReusedRead(lambda value: len(value) >= 10, clock)
    first = reused.get(reading(clock, 10))
    for _ in range(REUSE_FACTOR - 1):
        clock.now += 1
        assert reused.get(reading(clock, 10)) is first
    clock.now += 1
    assert reused.get(reading(clock, 10)) is not first


def test_a_small_value_is_always_read() -> None:
    clock = Clock()
    reused: ReusedRead[list[int]] = ReusedRead(lambda value: len(value) >= 10, clock)
    assert reused.get(reading(clock, 9)) is not reused.get(reading(clock, 9))
    large = reused.get(reading(clock, 10))
    clock.now += 2 * REUSE_FACTOR
    assert len(reused.get(reading(clock, 3))) == 3
    assert reused.get(reading(clock, 10)) is not large


@pytest.mark.parametrize(("seconds", "is_used"), [(REUSE_FACTOR, True), (2 * REUSE_FACTOR, False)])
def test_what_one_thread_reads_again_the_others_have_from_before_unless_it_is_old(seconds: int, is_used: bool) -> None:
    clock = Clock()
    reused: ReusedRead[list[int]] = ReusedRead(lambda _: True, clock)
    first = reused.get(reading(clock, 1))
    clock.now += seconds
    seen: list[list[int]] = []

    def read() -> list[int]:
        # As another thread would, while this one reads.
        seen.append(reused.get(reading(clock, 5)))
        return [1, 2]

    assert reused.get(read) == [1, 2]
    assert (seen == [first]) is is_used
