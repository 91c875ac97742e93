"""What a worker does when it is rung for."""

import mmap
from collections.abc import Callable
from typing import Any

from celery import Celery, bootsteps
from celery.signals import worker_shutting_down

from worker.doorbell import RING
from worker.liveness import BEAT_SECONDS, Liveness


class SharedFlag:
    """A flag that a process and the children that it forks share. It has no lock that a killed child could keep."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._byte[0] = 1

    def is_set(self) -> bool:
        return self._byte[0] != 0


def register_task(app: Celery, work: Callable[[], None]) -> None:
    """Let workers of `app` run `work` at each ring."""

    def heard() -> None:
        work()

    app.task(name=RING)(heard)


def shutdown_flag() -> SharedFlag:
    """A flag that is set as soon as the worker of this process is asked to end, while its task still runs."""
    flag = SharedFlag()

    def ended(**_: object) -> None:
        flag.set()

    worker_shutting_down.connect(ended, weak=False)
    return flag


def install_liveness(app: Celery, pulse: Liveness) -> None:
    """Let workers of `app` beat while their main loop turns: not while they are frozen or wait for the broker."""

    class Beating(bootsteps.StartStopStep):  # type: ignore[misc] # Celery ships no types.
        def register_with_event_loop(self, _worker: Any, hub: Any) -> None:
            # Called for each connection; Celery drops the timer with the connection.
            pulse.beat()
            hub.call_repeatedly(BEAT_SECONDS, pulse.beat)

    app.steps["worker"].add(Beating)
