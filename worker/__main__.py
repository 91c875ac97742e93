"""`python -m worker serve | run | scheduler`: the embedded set-up, or one part of a larger one."""

import pocl.search_path  # noqa: F401 # Before all imports that a file of the working directory could take.

# isort: split

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from celery import signals

from domain import logs
from domain.artifacts import ArtifactStore
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.environment import SettingsInvalid, read_settings, refuse_unknown_variables
from domain.process_secrets import erase_secrets
from domain.schema import DatabaseRefused, check_database, is_for_operator, refusal_sentence
from domain.service_links import log_service_links
from domain.settings import Settings
from domain.workers.models import Device
from worker.app import broker_url, celery_app
from worker.devices import NoUsableGpu, detect_devices
from worker.doorbell import Doorbell
from worker.embedded import CannotServe, ShutdownSignal, serve
from worker.landlock import landlock_version
from worker.liveness import Liveness
from worker.processes import adopt_orphans, hide_memory, kill_children
from worker.registration import Registration
from worker.scheduler import Scheduler
from worker.settings import WorkerSettings
from worker.supervisor import Supervisor
from worker.tasks import install_liveness, register_task, shutdown_flag

_log = structlog.get_logger(__name__)

_FAILED, _USAGE = 1, 2


def main() -> int:
    arguments = _parser().parse_args()
    try:
        refuse_unknown_variables(Settings, WorkerSettings)
        settings = read_settings(Settings, **_settings_of_command_line(arguments))
        options = read_settings(WorkerSettings)
        erase_secrets()
        arguments.command(settings, options)
    except (SettingsInvalid, DatabaseRefused) as error:
        print(error, file=sys.stderr)
        return _USAGE
    except DatabaseUnavailable as error:
        print(refusal_sentence(error), file=sys.stderr)
        return _USAGE
    except CannotServe as error:
        print(error, file=sys.stderr)
        return _FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve_parser = commands.add_parser("serve", help="broker, API, scheduler and worker on this machine")
    serve_parser.add_argument("--host", help="address to listen on (POCL_HOST)")
    serve_parser.add_argument("--port", type=int, help="port to listen on; 0 takes a free one (POCL_PORT)")
    serve_parser.add_argument("--home", type=Path, help="directory for all state (POCL_HOME)")
    serve_parser.set_defaults(command=_serve)
    commands.add_parser("run", help="a worker; needs POCL_REDIS_URL").set_defaults(command=_run)
    commands.add_parser("scheduler", help="the scheduler; needs POCL_REDIS_URL").set_defaults(command=_schedule)
    return parser


def _settings_of_command_line(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(arguments, name, None) for name in ("host", "port", "home")}
    return {name: value for name, value in options.items() if value is not None}


def _serve(settings: Settings, options: WorkerSettings) -> None:
    # The children have log files of their own; people read this terminal.
    logs.configure(logging.WARNING)
    shutdown = ShutdownSignal()
    shutdown.install()
    serve(settings, options, shutdown=shutdown, announce=lambda text: print(text, flush=True))


def _run(settings: Settings, options: WorkerSettings) -> None:
    logs.configure()
    log_service_links(os.environ)
    # Where this signal has a receiver, Celery leaves logging alone.
    signals.setup_logging.connect(_keep_logging, weak=False)
    _check_database(settings)
    app = celery_app(_broker_url(settings), options.queue)
    name = _process_name()
    shutdown = shutdown_flag()
    # An engine of this worker can neither read what it was started with nor trace it.
    hide_memory()
    if options.sandbox == "required" and not landlock_version():
        raise CannotServe("POCL_WORKER_SANDBOX is `required`, and this kernel has no Landlock: set it to `auto`.")
    devices, fault = _detect_devices(options)
    register_task(app, lambda: _work_one(settings, options, name, devices, fault, shutdown.is_set))
    registration = Registration(settings.database_url, name, devices, settings.heartbeat_seconds)
    signals.worker_ready.connect(lambda **_: registration.start(), weak=False)
    signals.worker_shutdown.connect(lambda **_: registration.stop(), weak=False)
    if options.pulse_file is not None:
        install_liveness(app, Liveness(options.pulse_file))
    _keep_ignoring_hangups()
    app.worker_main(
        [
            "worker",
            *("--pool=prefork", "--concurrency=1", f"--queues={options.queue}", f"--hostname=pocl@{name}"),
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        ]
    )


def _detect_devices(options: WorkerSettings) -> tuple[tuple[Device, ...], str | None]:
    """The devices, and why there are none."""
    try:
        return detect_devices(options), None
    except NoUsableGpu as error:
        # It registers without a device and stays in quarantine: no job for a GPU is trained on its CPU.
        _log.error("no_usable_gpu", reason=str(error))
        return (), f"{error} Then start the worker again."


def _keep_ignoring_hangups() -> None:
    """Where `nohup` started this process, a closed terminal goes on being ignored: Celery would start it again."""
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        return

    def ignore(**_: object) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    signals.worker_ready.connect(ignore, weak=False)


def _work_one(
    settings: Settings,
    options: WorkerSettings,
    name: str,
    devices: Sequence[Device],
    device_fault: str | None,
    should_stop: Callable[[], bool],
) -> None:
    adopt_orphans()
    # A database of its own: connections must not be shared with the process that forked this one.
    database = Database(settings.database_url)
    try:
        store = ArtifactStore(settings.artifact_root)
        supervisor = Supervisor(database, store, settings, options, name, devices, should_stop, kill_children)
        replace(supervisor, device_fault=device_fault).work_one()
    finally:
        database.close()


def _schedule(settings: Settings, options: WorkerSettings) -> None:
    logs.configure()
    log_service_links(os.environ)
    doorbell = Doorbell(celery_app(_broker_url(settings), options.queue))
    _check_database(settings)
    database = Database(settings.database_url)
    shutdown = ShutdownSignal()
    shutdown.install()
    liveness = None if options.pulse_file is None else Liveness(options.pulse_file)

    def wait(seconds: float) -> bool:
        if liveness is not None:
            liveness.beat()
        return shutdown.wait(seconds)

    try:
        Scheduler(database, ArtifactStore(settings.artifact_root), doorbell, settings, options, _process_name()).run(
            wait
        )
    finally:
        database.close()


def _check_database(settings: Settings) -> None:
    """
    Raises:
        DatabaseUnavailable, DatabaseRefused: an operator must look at it. One that is away is waited for later.
    """
    database = Database(settings.database_url)
    try:
        check_database(database)
    except DatabaseUnavailable as error:
        if is_for_operator(error):
            raise
        logging.getLogger(__name__).warning("database_unavailable: %s", error)
    finally:
        database.close()


def _process_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _broker_url(settings: Settings) -> str:
    if settings.redis_url is None:
        raise CannotServe("Set POCL_REDIS_URL to the broker, or run `python -m worker serve`, which starts one.")
    return broker_url(settings.redis_url, settings.redis_ca_file)


def _keep_logging(**_: object) -> None:
    return


if __name__ == "__main__":
    sys.exit(main())
