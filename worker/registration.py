"""A worker makes itself known: a row with its devices, renewed while the process lives."""

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from domain.db import DATABASE_UNAVAILABLE, Database
from domain.workers import repository
from domain.workers.models import Device

log = logging.getLogger(__name__)


@dataclass
class Registration:
    """Renews the row of `name` every `every` seconds, from a thread of the process that forks the jobs' processes."""

    database_url: str
    name: str
    devices: Sequence[Device]
    every: float
    _ended: threading.Event = field(default_factory=threading.Event)
    _connected: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        # A child that inherits an open connection would end it for both when it exits.
        os.register_at_fork(
            before=self._connected.acquire,
            after_in_parent=self._connected.release,
            after_in_child=self._connected.release,
        )
        self._thread = threading.Thread(target=self._run, name="registration", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop, and take the row away."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._tell(ended=False)
            if self._ended.wait(self.every):
                self._tell(ended=True)
                return

    def _tell(self, *, ended: bool) -> None:
        with self._connected:
            database = Database(self.database_url)
            try:
                with database.transaction(write=True) as session:
                    if ended:
                        repository.deregister_worker(session, self.name)
                    else:
                        repository.register_worker(session, self.name, self.devices)
            except DATABASE_UNAVAILABLE as error:
                log.warning("the worker could not make itself known: %s", type(error).__name__)
            finally:
                database.close()
