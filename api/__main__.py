"""`python -m api migrate | serve | openapi`: the database's schema, the service, its OpenAPI document."""

import argparse
import gc
import json
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import uvicorn
from pydantic import ValidationError
from uvicorn.config import STARTUP_FAILURE

from api.app import create_app
from api.jobs.watcher import JobWatcher
from api.url_limit import UrlLimitProtocol
from domain import logs
from domain.db import upgrade
from domain.settings import Settings

_GRACE_SECONDS = 10


def main() -> int:
    commands = {"migrate": _migrate, "serve": _serve, "openapi": _print_openapi}
    parser = argparse.ArgumentParser(prog="python -m api", description=__doc__)
    parser.add_argument("command", choices=commands)
    try:
        commands[parser.parse_args().command]()
    except ValidationError as error:
        # Settings are wrong. Their values may be secret, so none is printed.
        for wrong in error.errors(include_input=False, include_url=False, include_context=False):
            field = "_".join(str(part) for part in wrong["loc"]).upper()
            sys.stderr.write(f"{f'POCL_{field}: ' if field else ''}{wrong['msg'].removeprefix('Value error, ')}\n")
        return 2
    return 0


def _migrate() -> None:
    logs.configure()
    upgrade(Settings())


def _serve() -> None:
    settings = Settings()
    logs.configure()
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=UrlLimitProtocol,
        access_log=False,
        # The configuration above holds for uvicorn's loggers as well.
        log_config=None,
        server_header=False,
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
        app = create_app(Settings(home=Path(home)))
        app.state.database.close()
    sys.stdout.write(json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
