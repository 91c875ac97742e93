"""The registration of a worker: a row with its devices, renewed while the process lives."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.workers import repository
from domain.workers.models import Device, GpuFigures

_log = structlog.get_logger(__name__)


@dataclass
class Registration:
    """Renews the row of `name` every `interval` seconds, from a thread of the process that forks the jobs' children."""

    database_url: str
    name: str
    devices: Sequence[Device]
    interval: float
    read_gpus: Callable[[], Sequence[GpuFigures]] = tuple
    """What the driver says of the GPUs now; nothing unless given. It returns at once."""
    _stopping: threading.Event = field(default_factory=threading.Event)
    _connection_lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        # A child that inherits an open connection would end it for both when it exits.
        os.register_at_fork(
            before=self._connection_lock.acquire,
            after_in_parent=self._connection_lock.release,
            after_in_child=self._connection_lock.release,
        )
        self._thread = threading.Thread(target=self._run, name="registration", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop renewing, and delete the row."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._tell(ended=False)
            if self._stopping.wait(self.interval):
                self._tell(ended=True)
                return

    def _tell(self, *, ended: bool) -> None:
        with self._connection_lock:
            database = Database(self.database_url)
            try:
                with database.transaction(write=True) as session:
                    if ended:
                        repository.deregister_worker(session, self.name)
                    else:
                        repository.register_worker(session, self.name, self.devices, gpu_figures=self.read_gpus())
            except DatabaseUnavailable as error:
                _log.warning("worker_not_registered", error=str(error))
            finally:
                database.close()
