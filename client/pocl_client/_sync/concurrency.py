"""What differs between the two clients: clocks, threads, and work side by side."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """The time, and waiting for it to pass."""

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


def in_thread(function: Callable[..., T], *arguments: object) -> T:
    """What the function returns: here the caller may be blocked."""
    return function(*arguments)


def run_all(tasks: Sequence[Callable[[Callable[[], bool]], None]], limit: int) -> None:
    """Run all tasks, `limit` at a time. The first that fails stops the others, and its exception is raised.

    Args:
        tasks: each gets a function that says whether it should stop, and asks it often.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, limit), thread_name_prefix="pocl-client") as pool:
        try:
            done, _ = wait([pool.submit(task, stop.is_set) for task in tasks], return_when=FIRST_EXCEPTION)
            failed = next((each for each in done if each.exception() is not None), None)
            if failed is not None:
                failed.result()
        finally:
            # Also where the caller is interrupted: what is not begun is not begun, and what runs stops soon.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
