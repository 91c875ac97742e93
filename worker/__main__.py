"""`python -m worker serve | run | scheduler`: the embedded set-up, or one part of a larger one."""

import pocl.search_path  # noqa: F401 # Before all imports that a file of the working directory could take.

# isort: split

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from celery import signals
from opentelemetry.trace import NoOpTracer, Tracer

from domain import logs
from domain.artifact_stores import ArtifactStoreUnusable, check_artifact_store, open_artifact_store
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.environment import SettingsInvalid, read_settings, refuse_unknown_variables
from domain.process_secrets import erase_secrets
from domain.schema import DatabaseRefused, check_database, is_for_operator, refusal_sentence
from domain.service_links import log_service_links
from domain.settings import Settings
from domain.tracing import create_tracer_provider
from domain.workers.models import Device
from worker.app import broker_url, celery_app
from worker.devices import NoUsableGpu, detect_devices
from worker.doorbell import Doorbell
from worker.embedded import CannotServe, ShutdownSignal, serve
from worker.exports.watcher import ExportWatcher
from worker.gpu_sampler import GpuSampler
from worker.landlock import landlock_version
from worker.leadership import LeaderDatabase, Leadership
from worker.liveness import Liveness
from worker.processes import adopt_orphans, hide_memory, kill_children
from worker.registration import Registration
from worker.scheduler import Scheduler
from worker.settings import WorkerSettings
from worker.supervisor import Supervisor
from worker.tasks import install_liveness, register_task, shutdown_flag
from worker.valkey import read_address

_log = structlog.get_logger(__name__)

_FAILED, _USAGE = 1, 2


def main() -> int:
    arguments = _parser().parse_args()
    try:
        refuse_unknown_variables(Settings, WorkerSettings)
        settings = read_settings(Settings, **_settings_of_command_line(arguments))
        count = getattr(arguments, "job_workers", None)
        options = read_settings(WorkerSettings, **({} if count is None else {"count": count}))
        erase_secrets()
        arguments.command(settings, options)
    except (SettingsInvalid, DatabaseRefused, ArtifactStoreUnusable) as error:
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
    serve_parser.add_argument("--api-workers", type=int, help="processes of the API (POCL_API_WORKERS)")
    serve_parser.add_argument(
        "--job-workers", type=int, help="workers that run jobs; one per GPU unless given (POCL_WORKER_COUNT)"
    )
    serve_parser.set_defaults(command=_serve)
    needs = "needs POCL_REDIS_URL, or `worker serve` with the same POCL_HOME"
    commands.add_parser("run", help=f"a worker; {needs}").set_defaults(command=_run)
    commands.add_parser("scheduler", help=f"the scheduler; {needs}").set_defaults(command=_schedule)
    return parser


def _settings_of_command_line(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(arguments, name, None) for name in ("host", "port", "home", "api_workers")}
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
    check_artifact_store(settings)
    app = celery_app(_broker_url(settings), options.queue)
    name = _process_name()
    shutdown = shutdown_flag()
    # An engine of this worker can neither read what it was started with nor trace it.
    hide_memory()
    if options.sandbox == "required" and not landlock_version():
        raise CannotServe("POCL_WORKER_SANDBOX is `required`, and this kernel has no Landlock: set it to `auto`.")
    devices, fault = _detect_devices(options)
    register_task(app, lambda: _work_one(settings, options, name, devices, fault, shutdown.is_set))
    sampler = GpuSampler(devices, settings.heartbeat_seconds)
    registration = Registration(settings.database_url, name, devices, settings.heartbeat_seconds, sampler.latest)
    signals.worker_ready.connect(lambda **_: sampler.start(), weak=False)
    signals.worker_ready.connect(lambda **_: registration.start(), weak=False)
    signals.worker_shutdown.connect(lambda **_: registration.stop(), weak=False)
    if options.exports:
        exports = ExportWatcher(settings.database_url, name, options.export_seconds)
        signals.worker_ready.connect(lambda **_: exports.start(), weak=False)
        # A job may take minutes to save its state after the first of these.
        signals.worker_shutting_down.connect(lambda **_: exports.leave(), weak=False)
        signals.worker_shutdown.connect(lambda **_: exports.stop(), weak=False)
    if options.pulse_file is not None:
        install_liveness(app, Liveness(options.pulse_file))
    _keep_ignoring_the_terminal()
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


def _keep_ignoring_the_terminal() -> None:
    """What this process was started to ignore goes on being ignored, a closed terminal under `nohup` and Ctrl-C behind
    the `&` of a script: Celery would start it again, or end it, and let the process end that does the job.
    """
    ignored = [each for each in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(each) is signal.SIG_IGN]
    if not ignored:
        return

    def ignore(**_: object) -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    signals.worker_ready.connect(ignore, weak=False)
    signals.worker_process_init.connect(ignore, weak=False)


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
        store = open_artifact_store(settings)
        supervisor = Supervisor(database, store, settings, options, name, devices, should_stop, kill_children)
        with _tracer(settings) as tracer:
            replace(supervisor, device_fault=device_fault, tracer=tracer).work_one()
    finally:
        database.close()


@contextmanager
def _tracer(settings: Settings) -> Iterator[Tracer]:
    """Makes the spans of an attempt, and has sent them at the end of the block; without a collector it makes none."""
    if settings.traces_endpoint is None:
        yield NoOpTracer()
        return
    # Made in the process that uses it: its thread does not outlive a fork.
    provider = create_tracer_provider(settings.traces_endpoint, service="pocl-worker", ratio=settings.traces_ratio)
    try:
        yield provider.get_tracer("pocl")
    finally:
        provider.shutdown()


def _schedule(settings: Settings, options: WorkerSettings) -> None:
    logs.configure()
    log_service_links(os.environ)
    doorbell = Doorbell(celery_app(_broker_url(settings), options.queue))
    _check_database(settings)
    check_artifact_store(settings)
    database = Database(settings.database_url)
    shutdown = ShutdownSignal()
    shutdown.install()
    liveness = None if options.pulse_file is None else Liveness(options.pulse_file)

    def wait(seconds: float) -> bool:
        if liveness is not None:
            liveness.beat()
        return shutdown.wait(seconds)

    name = _process_name()
    duties_database = LeaderDatabase(settings.database_url, name)
    leadership = Leadership(database, duties_database, name, options.leader_seconds)
    store = open_artifact_store(settings)
    try:
        Scheduler(database, store, doorbell, settings, options, name, leadership).run(wait)
    finally:
        duties_database.close()
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
    if settings.redis_url is not None:
        return broker_url(settings.redis_url, settings.redis_ca_file)
    address = read_address(settings.home)
    if address is None:
        raise CannotServe(
            "Set POCL_REDIS_URL to the broker, or run `python -m worker serve`, which starts one; workers with the same"
            " POCL_HOME then join it."
        )
    return address


def _keep_logging(**_: object) -> None:
    return


if __name__ == "__main__":
    sys.exit(main())
