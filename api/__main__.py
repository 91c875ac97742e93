"""`python -m api migrate | serve | keys | openapi`: the schema of the database, the service, its keys, its document."""

import pocl.search_path  # noqa: F401 # Before all imports that a file of the working directory could take.

# isort: split

import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import structlog
import uvicorn

from api.app import create_app
from api.descriptors import TooFewDescriptors, claim_descriptors
from api.key_commands import add_key_commands
from api.process_group import ProcessGroup
from api.server import serve_http
from api.shared_counts import SharedCounts
from domain import logs
from domain.artifact_stores import ArtifactStoreUnusable, check_artifact_store
from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.environment import SettingsInvalid, read_settings, refuse_unknown_variables
from domain.errors import ApiError
from domain.local_key import make_local_key, secure_home
from domain.process_secrets import erase_secrets
from domain.schema import DatabaseRefused, check_database, is_for_operator, refusal_sentence, upgrade
from domain.service_links import log_service_links
from domain.settings import Settings

_FAILED, _USAGE = 1, 2

_log = structlog.get_logger(__name__)


def main() -> int:
    arguments = _parser().parse_args()
    try:
        # Processes of a machine may share an environment, with settings of the worker in it.
        refuse_unknown_variables(Settings, other_prefixes=("POCL_WORKER_",))
        arguments.command(arguments)
    except (SettingsInvalid, DatabaseRefused, ArtifactStoreUnusable, TooFewDescriptors) as error:
        sys.stderr.write(f"{error}\n")
        return _USAGE
    except ApiError as error:
        sys.stderr.write(
            f"{error.detail}\n" + "".join(f"{each.pointer}: {each.detail}\n" for each in error.field_errors)
        )
        return _FAILED
    except DatabaseUnavailable as error:
        sys.stderr.write(f"{refusal_sentence(error)}\n")
        return _USAGE if is_for_operator(error) else _FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m api", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    migrate = commands.add_parser("migrate", help="bring the database to this version, beside the one before it")
    migrate.add_argument(
        "--contract",
        action="store_true",
        help="also take away what the version before needs, once it runs no more",
    )
    migrate.set_defaults(command=_migrate)
    serve_parser = commands.add_parser("serve", help="serve HTTP")
    serve_parser.add_argument("--workers", type=int, help="how many processes share the socket (POCL_API_WORKERS)")
    serve_parser.set_defaults(command=_serve)
    commands.add_parser("openapi", help="print the OpenAPI document").set_defaults(command=_print_openapi)
    add_key_commands(commands.add_parser("keys", help="make, list, revoke and rotate API keys"))
    return parser


def _migrate(arguments: argparse.Namespace) -> None:
    logs.configure()
    upgrade(read_settings(Settings), contract=arguments.contract)


def _serve(arguments: argparse.Namespace) -> None:
    given = {} if arguments.workers is None else {"api_workers": arguments.workers}
    settings = read_settings(Settings, **given)
    erase_secrets()
    logs.configure()
    log_service_links(os.environ)
    settings = claim_descriptors(settings)
    _check_database(settings)
    check_artifact_store(settings)
    secure_home(settings.home)
    if settings.api_key is None:
        make_local_key(settings.home)
    status = serve_http(settings) if settings.api_workers == 1 else _serve_in_processes(settings)
    if status:
        sys.exit(status)


def _serve_in_processes(settings: Settings) -> int:
    # The configuration serves for the socket alone; each process makes its own.
    sockets = [uvicorn.Config("api", host=settings.host, port=settings.port, log_config=None).bind_socket()]
    rate_counts = SharedCounts()
    # What the processes have in common is collected by none of them, and so stays shared with the parent.
    gc.collect()
    gc.freeze()
    return ProcessGroup(
        settings.api_workers,
        sockets,
        lambda on_turn: serve_http(settings, sockets, on_turn=on_turn, rate_counts=rate_counts),
    ).run()


def _check_database(settings: Settings) -> None:
    database = Database(settings.database_url)
    try:
        check_database(database)
    except DatabaseUnavailable as error:
        if is_for_operator(error):
            raise
        # Requests are answered by 503 until it is there.
        _log.warning("database_unavailable", error=str(error))
    finally:
        # Processes that are forked share no connection.
        database.close()


def _print_openapi(_arguments: argparse.Namespace) -> None:
    # The document depends on no setting; a temporary home leaves the working directory clean.
    with tempfile.TemporaryDirectory() as home:
        app = create_app(read_settings(Settings, home=Path(home)))
        app.state.database.close()
    sys.stdout.write(json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
