"""The one way in which tests wait: look at something until it is so, or a deadline passes."""

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def eventually(look: Callable[[], Found], *, within: float = 30.0, every: float = 0.02, what: str = "") -> Found:
    """The first true value of `look()`. An `AssertionError` of `look` counts as not yet.

    Raises:
        AssertionError: after `within` seconds, with what was seen last.
    """
    deadline = time.monotonic() + within
    while True:
        failure: AssertionError | None = None
        seen: Found | None = None
        try:
            seen = look()
        except AssertionError as error:
            failure = error
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what or look}; last seen: {seen!r}") from failure
        time.sleep(every)
