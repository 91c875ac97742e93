"""How fast devices do jobs is learnt from those that ended well."""

import math
import statistics

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.db import Database
from domain.throughput.repository import START_SECONDS, find_speed, record_job, size_class


@given(rates=st.lists(st.floats(1e9, 1e14), min_size=1, max_size=6))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_speed_is_the_geometric_mean_with_its_spread(database: Database, rates: list[float]) -> None:
    name = f"device of {rates}"[:200]
    with database.transaction(write=True) as session:
        for rate in rates:
            record_job(session, "cpu", name, size=5, flops=rate * 100, seconds=100 + START_SECONDS)
        session.flush()
        speed = find_speed(session, "cpu", name, 5)
    assert speed is not None
    assert speed.jobs == len(rates)
    assert speed.expected == pytest.approx(statistics.geometric_mean(rates), rel=1e-6)
    assert speed.low < speed.expected < speed.high
    if len(rates) > 1:
        spread = 2 * statistics.stdev(map(math.log, rates)) * math.sqrt(1 + 1 / len(rates))
        assert math.log(speed.high / speed.expected) == pytest.approx(max(0.2, spread), rel=1e-4, abs=1e-4)
    low, expected, high = speed.seconds(1e15)
    assert START_SECONDS < low < expected < high


def test_only_students_of_about_the_size_tell(database: Database) -> None:
    with database.transaction(write=True) as session:
        record_job(session, "cuda", "A", size=10, flops=1e12, seconds=100)
        record_job(session, "cuda", "A", size=13, flops=1e15, seconds=100)
        assert find_speed(session, "cuda", "B", 10) is None
        assert find_speed(session, "cpu", "A", 10) is None
        assert find_speed(session, "cuda", "A", 7) is None
        near, far = find_speed(session, "cuda", "A", 11), find_speed(session, "cuda", "A", 12)
    assert near is not None
    assert far is not None
    assert far.expected == pytest.approx(1000 * near.expected)


@pytest.mark.parametrize(("parameters", "expected"), [(0, 0), (1, 0), (3, 0), (4, 1), (4**13 - 1, 12), (4**13, 13)])
def test_a_size_class_is_a_logarithm_to_base_4(parameters: int, expected: int) -> None:
    assert size_class(parameters) == expected
