"""`python -m worker.exports`: makes the exports that are due for a worker, one after the other, and ends.

The worker's variables that are secrets come as a line of JSON on standard input, so that no other process of this user
reads them in `/proc`. SIGTERM leaves the export that is under way to the next process.
"""

import pocl.search_path  # noqa: F401 # Before all imports that a file of the working directory could take.

# isort: split

import json
import os
import signal
import sys
import threading

import structlog

from domain import logs
from domain.artifact_stores import open_artifact_store
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.environment import SettingsInvalid, read_settings
from domain.settings import Settings
from worker.exports.conversion import GgufConversion
from worker.exports.exporter import CheckpointExporter
from worker.processes import hide_memory
from worker.scratch_directory import ScratchDirectory
from worker.settings import WorkerSettings

_log = structlog.get_logger(__name__)

_FAILED, _USAGE = 1, 2
_NICENESS = 5


def main() -> int:
    hide_memory()
    # It gives way to jobs: it reads whole checkpoints, and digests them.
    os.nice(_NICENESS)
    os.environ.update(json.loads(sys.stdin.readline()))
    logs.configure()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    # A terminal that closes, or Ctrl-C in it, is for the worker, which then asks this process to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        settings, options = read_settings(Settings), read_settings(WorkerSettings)
    except SettingsInvalid as error:
        _log.error("settings_invalid", reason=str(error))
        return _USAGE
    database = Database(settings.database_url)
    scratch: ScratchDirectory | None = None
    try:
        scratch = ScratchDirectory.make(settings.work_root / "exports")
        exporter = CheckpointExporter(
            database, open_artifact_store(settings), scratch.path, GgufConversion(settings, options), stopping.is_set
        )
        while not stopping.is_set() and exporter.turn():
            pass
    except DatabaseUnavailable as error:
        _log.warning("database_unavailable", error=str(error))
        return _FAILED
    finally:
        if scratch is not None:
            scratch.remove()
        database.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
