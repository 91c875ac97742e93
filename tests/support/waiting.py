"""The one way in which tests wait: poll a condition until it holds, or a deadline passes."""

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def eventually(condition: Callable[[], Value], *, within: float = 30.0, every: float = 0.05, what: str = "") -> Value:
    """The first true value of `condition()`. An `AssertionError` of `condition` counts as not yet.

    Raises:
        AssertionError: after `within` seconds, with the last value.
    """
    deadline = time.monotonic() + within
    while True:
        failure: AssertionError | None = None
        value: Value | None = None
        try:
            value = condition()
        except AssertionError as error:
            failure = error
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what or condition}; last value: {value!r}") from failure
        time.sleep(every)
