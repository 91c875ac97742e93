"""Looks for exports that are due from a thread of a worker, and starts the process that makes them.

The worker forks a child for each job, and what has used a bucket must not fork: so the worker itself reads rows alone,
and a process of its own has the store. That process runs beside the jobs: it needs no GPU, and gives way to them.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.jobs.export_feed import has_due_export
from domain.process_secrets import SECRET_VARIABLES, TRACKER_SECRETS
from domain.workers.repository import worker_health
from worker.processes import spawn, terminate
from worker.python_path import child_python_path, module_command

_log = structlog.get_logger(__name__)

_END_SECONDS: Final = 10.0
"""How long the process may take to leave an export to another one."""
_LOOK_SECONDS: Final = 0.5
_MAX_WAIT_SECONDS: Final = 300.0
_OWN_OUTPUT: Final = 2
"""The descriptor of this process's standard error, where the log goes."""


@dataclass
class ExportWatcher:
    """Sees that exports are made, one at a time, beside the jobs of the worker `name`, unless it is drained."""

    database_url: str
    name: str
    interval: float
    """Seconds between two looks; after a process that failed the wait doubles, up to five minutes."""
    command: Sequence[str] = field(default_factory=lambda: module_command(sys.executable, "worker.exports"))
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
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
        self._thread = threading.Thread(target=self._run, name="exports", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Stop looking, and have the process ended that makes exports, without waiting: another worker goes on."""
        self._stopping.set()

    def stop(self) -> None:
        """Leave, and wait until the process has ended."""
        self.leave()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        wait = self.interval
        while not self._stopping.wait(wait):
            has_failed = self.is_due() and not self._make_exports()
            wait = min(2 * wait, _MAX_WAIT_SECONDS) if has_failed else self.interval

    def is_due(self) -> bool:
        """Whether an export is due, and this worker takes any; false where the database is unavailable."""
        with self._connection_lock:
            database = Database(self.database_url)
            try:
                with database.transaction(write=False) as session:
                    is_drained = worker_health(session, self.name, max_wait_seconds=0).drained
                    return not is_drained and has_due_export(session)
            except DatabaseUnavailable as error:
                _log.warning("database_unavailable", error=str(error))
                return False
            finally:
                database.close()

    def _make_exports(self) -> bool:
        """Run the process until it ends, or this worker does; whether it did as it should."""
        try:
            process = self._start()
        except OSError as error:
            _log.error("export_process_not_started", error=str(error))
            return False
        while not self._stopping.is_set():
            try:
                status = process.wait(_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            if status:
                _log.warning("export_process_failed", status=status)
            return status == 0
        terminate(process, _END_SECONDS)
        return True

    def _start(self) -> subprocess.Popen[bytes]:
        secret = {*SECRET_VARIABLES, *TRACKER_SECRETS}
        environment = {name: value for name, value in self.environ.items() if name not in secret}
        if python_path := child_python_path(self.environ):
            environment["PYTHONPATH"] = python_path
        process = spawn(
            self.command,
            stdin=subprocess.PIPE,
            stdout=_OWN_OUTPUT,
            stderr=subprocess.STDOUT,
            environment=environment,
        )
        assert process.stdin is not None
        secrets = {name: self.environ[name] for name in SECRET_VARIABLES if name in self.environ}
        try:
            with process.stdin as pipe:
                pipe.write(json.dumps(secrets).encode() + b"\n")
        except BrokenPipeError:
            _log.warning("export_process_ended_early")
        return process
