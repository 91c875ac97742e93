"""`python -m api migrate | serve | openapi`: the database's schema, the service, its OpenAPI document."""

import pocl.search_path  # noqa: F401 # Before all imports that a file of the working directory could take.

# isort: split

import argparse
import gc
import json
import os
import socket
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import structlog
import uvicorn
from uvicorn.config import STARTUP_FAILURE

from api.access_log import AccessLog
from api.app import create_app
from api.descriptors import TooFewDescriptors, claim_descriptors
from api.http_limits import ConnectionLimits
from api.http_protocol import ConnectionTable, protocol_over
from api.jobs.watcher import JobWatcher
from domain import logs
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.environment import SettingsInvalid, read_settings, refuse_unknown_variables
from domain.process_secrets import erase_secrets
from domain.schema import DatabaseRefused, check_database, is_for_operator, refusal_sentence, upgrade
from domain.service_links import log_service_links
from domain.settings import Settings

_GRACE_SECONDS = 10
_FAILED, _USAGE = 1, 2

_log = structlog.get_logger(__name__)


def main() -> int:
    commands = {"migrate": _migrate, "serve": _serve, "openapi": _print_openapi}
    parser = argparse.ArgumentParser(prog="python -m api", description=__doc__)
    parser.add_argument("command", choices=commands)
    try:
        command = commands[parser.parse_args().command]
        # Processes of a machine may share an environment, with settings of the worker in it.
        refuse_unknown_variables(Settings, other_prefixes=("POCL_WORKER_",))
        command()
    except (SettingsInvalid, DatabaseRefused, TooFewDescriptors) as error:
        sys.stderr.write(f"{error}\n")
        return _USAGE
    except DatabaseUnavailable as error:
        sys.stderr.write(f"{refusal_sentence(error)}\n")
        return _USAGE if is_for_operator(error) else _FAILED
    return 0


def _migrate() -> None:
    logs.configure()
    upgrade(read_settings(Settings))


def _serve() -> None:
    settings = read_settings(Settings)
    erase_secrets()
    logs.configure()
    _log_environment(settings)
    settings = claim_descriptors(settings)
    access_log = None if settings.access_log == "off" else AccessLog(only_errors=settings.access_log == "errors")
    app = create_app(settings, access_log)
    _check_database(app.state.database)
    limits = ConnectionLimits(
        max_connections=settings.max_connections,
        head_seconds=settings.head_seconds,
        body_seconds=settings.body_seconds,
        idle_seconds=settings.idle_seconds,
        write_seconds=settings.write_seconds,
    )
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol_over(ConnectionTable(limits)),
        # No route takes a websocket: a handshake is answered as any other request.
        ws="none",
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies or None,
        access_log=False,
        # The configuration above holds for uvicorn's loggers as well.
        log_config=None,
        server_header=False,
        timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    server = _Server(config, app.state.watcher)
    # Imported modules live for ever: traversed by each garbage collection, they would delay all responses by a tenth of
    # a second.
    gc.collect()
    gc.freeze()
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(STARTUP_FAILURE)


def _log_environment(settings: Settings) -> None:
    """Say what in the surroundings of the service is ignored, or wrong."""
    log_service_links(os.environ)
    if settings.home.is_dir() and settings.home.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = oct(stat.S_IMODE(settings.home.stat().st_mode))
        _log.warning("home_open_to_others", home=str(settings.home), mode=mode, hint="Run: chmod 700 on it.")


def _check_database(database: Database) -> None:
    try:
        check_database(database)
    except DatabaseUnavailable as error:
        if is_for_operator(error):
            raise
        # Requests are answered by 503 until it is there.
        _log.warning("database_unavailable", error=str(error))


class _Server(uvicorn.Server):
    """Uvicorn waits for the responses in progress when it stops, so long polls and streams must be ended."""

    def __init__(self, config: uvicorn.Config, watcher: JobWatcher) -> None:
        super().__init__(config)
        self._watcher = watcher

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watcher.close()
        await super().shutdown(sockets)


def _print_openapi() -> None:
    # The document depends on no setting; a temporary home leaves the working directory clean.
    with tempfile.TemporaryDirectory() as home:
        app = create_app(read_settings(Settings, home=Path(home)))
        app.state.database.close()
    sys.stdout.write(json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
