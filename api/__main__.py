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
        # Of the settings; the values may be secret.
        for found in error.errors(include_input=False, include_url=False, include_context=False):
            field = "_".join(str(part) for part in found["loc"]).upper()
            sys.stderr.write(f"{f'POCL_{field}: ' if field else ''}{found['msg'].removeprefix('Value error, ')}\n")
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
        access_log=False,
        # The configuration above holds for uvicorn's loggers as well.
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    server = _Server(config, app.state.watcher)
    # What was imported stays: looked through at each collection, it would hold up all answers for a tenth of a second.
    gc.collect()
    gc.freeze()
    with suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(STARTUP_FAILURE)


class _Server(uvicorn.Server):
    """Uvicorn, which waits for the answers under way when it stops: those that follow a job must end by themselves."""

    def __init__(self, config: uvicorn.Config, watch: JobWatcher) -> None:
        super().__init__(config)
        self._watch = watch

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watch.close()
        await super().shutdown(sockets)


def _print_openapi() -> None:
    # The document depends on no setting; a home of its own leaves the working directory clean.
    with tempfile.TemporaryDirectory() as home:
        app = create_app(Settings(home=Path(home)))
        app.state.database.close()
    sys.stdout.write(json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
