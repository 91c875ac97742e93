"""The task that runs at each ring, and how a Celery worker reports liveness and shutdown."""

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

    def on_ring() -> None:
        work()

    app.task(name=RING)(on_ring)


def shutdown_flag() -> SharedFlag:
    """A flag that is set as soon as the worker of this process is asked to shut down, while its task still runs."""
    flag = SharedFlag()

    def on_shutdown(**_: object) -> None:
        flag.set()

    worker_shutting_down.connect(on_shutdown, weak=False)
    return flag


def install_liveness(app: Celery, liveness: Liveness) -> None:
    """Let workers of `app` report liveness from their event loop: not while they are frozen or wait for the broker."""

    class _LivenessStep(bootsteps.StartStopStep):  # type: ignore[misc] # Celery ships no types.
        def register_with_event_loop(self, _worker: Any, hub: Any) -> None:
            # Called for each connection; Celery drops the timer with the connection.
            liveness.beat()
            hub.call_repeatedly(BEAT_SECONDS, liveness.beat)

    app.steps["worker"].add(_LivenessStep)
