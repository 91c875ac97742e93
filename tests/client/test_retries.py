"""When requests are sent again: the rules themselves."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl_client.retries import RetryPolicy, retry_after_of

NOW = datetime(2026, 11, 24, 10, 0, tzinfo=UTC)


@given(st.integers(1, 10_000), st.floats(0, 1), st.none() | st.floats(0, 1e6))
def test_waits_are_bounded_and_respect_what_the_service_asks(attempt: int, chance: float, asked: float | None) -> None:
    policy = RetryPolicy(attempts=10_001, random=lambda: chance)
    wait = policy.wait_after(attempt, asked)
    if asked is not None and asked > policy.max_retry_after:
        assert wait is None
    else:
        assert wait is not None
        assert (asked or 0) <= wait <= max(policy.max_wait, (asked or 0) + 1)


def test_waits_double() -> None:
    policy = RetryPolicy(attempts=9, random=lambda: 1.0)
    assert [policy.wait_after(attempt) for attempt in range(1, 9)] == [0.5, 1, 2, 4, 8, 8, 8, 8]


@pytest.mark.parametrize("attempts", [1, 3])
def test_no_more_tries_than_allowed(attempts: int) -> None:
    policy = RetryPolicy(attempts=attempts)
    assert [policy.wait_after(attempt) is None for attempt in range(1, attempts + 1)] == [False] * (attempts - 1) + [
        True
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("Tue, 24 Nov 2026 10:00:30 GMT", 30.0),
        ("Tue, 24 Nov 2026 09:00:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        ("", None),
    ],
)
def test_retry_after_is_read(text: str, seconds: float | None) -> None:
    assert retry_after_of({"retry-after": text}, NOW) == seconds


def test_no_header_asks_for_nothing() -> None:
    assert retry_after_of({}) is None
