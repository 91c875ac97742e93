"""What a worker does when it is rung for."""

import mmap
from collections.abc import Callable

from celery import Celery
from celery.signals import worker_shutting_down

from worker.doorbell import RING


class SharedFlag:
    """A flag that a process and the children that it forks share. It has no lock that a killed child could keep."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._byte[0] = 1

    def is_set(self) -> bool:
        return self._byte[0] != 0


def answer(app: Celery, work: Callable[[], None]) -> None:
    """Let workers of `app` run `work` at each ring."""

    def heard() -> None:
        work()

    app.task(name=RING)(heard)


def stop_flag() -> SharedFlag:
    """A flag that is set as soon as the worker of this process is asked to end, while its task still runs."""
    flag = SharedFlag()

    def ended(**_: object) -> None:
        flag.set()

    worker_shutting_down.connect(ended, weak=False)
    return flag
