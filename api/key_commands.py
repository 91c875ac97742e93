"""`python -m api keys`: make, list, revoke and rotate keys in the database, whether the service runs or not."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Final, get_args

from sqlalchemy.orm import Session

from domain.db import Database
from domain.environment import SettingsInvalid, read_settings
from domain.keys import repository
from domain.keys.models import ApiKey, Scope
from domain.local_key import FILE_NAME, replace_local_key, secure_home
from domain.projects.models import DEFAULT_PROJECT
from domain.schema import create_if_missing
from domain.settings import Settings

_LOCAL: Final = "local"
_PAGE: Final = 100
_GRACE_SECONDS: Final = 3600


def add_key_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands to the parser; each sets `command`, which takes the parsed arguments."""
    parser.description = __doc__
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    create = commands.add_parser("create", help="make a key, and print it: it is shown once")
    create.add_argument("--name", default="made by a command", help="what the key is for")
    create.add_argument("--scope", choices=get_args(Scope), default="admin", help="what it may do (default: admin)")
    create.add_argument("--project", default=DEFAULT_PROJECT, help=f"whose key it is (default: {DEFAULT_PROJECT})")
    create.add_argument("--days", type=float, metavar="N", help="in how many days it expires; never unless given")
    create.set_defaults(command=_create)
    listing = commands.add_parser("list", help="list keys, newest first, without their secrets")
    listing.add_argument("--project", help="of this project alone")
    listing.set_defaults(command=_list)
    revoke = commands.add_parser("revoke", help="have a key accepted no more, within seconds")
    revoke.add_argument("id", help="the id of the key: key_...")
    revoke.set_defaults(command=_revoke)
    rotate = commands.add_parser("rotate", help="give a key a new secret, and print it: it is shown once")
    rotate.add_argument("id", help=f"the id of the key: key_..., or `{_LOCAL}` for that of the first start")
    rotate.add_argument(
        "--grace-seconds", type=float, metavar="N", default=_GRACE_SECONDS,
        help=f"for how long the old secret is accepted too (default: {_GRACE_SECONDS})",
    )  # fmt: skip
    rotate.set_defaults(command=_rotate)


def _create(arguments: argparse.Namespace) -> None:
    expires_at = None
    if arguments.days is not None:
        expires_at = datetime.now(UTC) + timedelta(days=_bounded(arguments.days, "--days", 36_500))
    with _transaction(write=True) as session:
        key, token = repository.create_key(
            session, project=arguments.project, name=arguments.name, scopes=[arguments.scope], expires_at=expires_at
        )
    _say(f"{key.id}: scope {arguments.scope}, project {key.project}. Keep the key: it is not shown again.")
    sys.stdout.write(f"{token}\n")


def _list(arguments: argparse.Namespace) -> None:
    after = None
    while True:
        with _transaction(write=False) as session:
            page = repository.list_keys(session, project=arguments.project, limit=_PAGE, after=after)
        for key in page.rows:
            sys.stdout.write(f"{_describe(key)}\n")
        if not page.has_more:
            return
        after = page.rows[-1].id


def _revoke(arguments: argparse.Namespace) -> None:
    with _transaction(write=True) as session:
        repository.revoke_key(session, arguments.id, project=None)
    _say(f"{arguments.id}: revoked; each API process refuses it within seconds.")


def _rotate(arguments: argparse.Namespace) -> None:
    if arguments.id == _LOCAL:
        home = read_settings(Settings).home
        secure_home(home)
        replace_local_key(home)
        _say(f"The new key is in {home / FILE_NAME}; each API process takes it, and it alone, within seconds.")
        return
    grace = _bounded(arguments.grace_seconds, "--grace-seconds", 365 * 86_400)
    with _transaction(write=True) as session:
        key, token = repository.rotate_key(session, arguments.id, grace_seconds=grace, project=None)
    _say(f"{key.id}: the old secret is accepted for {grace:g} s more. Keep the key: it is not shown again.")
    sys.stdout.write(f"{token}\n")


@contextmanager
def _transaction(*, write: bool) -> Iterator[Session]:
    settings = read_settings(Settings)
    create_if_missing(settings)
    database = Database(settings.database_url)
    try:
        with database.transaction(write=write) as session:
            yield session
    finally:
        database.close()


def _describe(key: ApiKey) -> str:
    fields = {
        "project": key.project,
        "scopes": ",".join(key.scopes),
        "expires": _moment(key.expires_at),
        "last used": _moment(key.last_used_at),
        "revoked": _moment(key.revoked_at),
    }
    return "  ".join([key.id, *(f"{name}={value}" for name, value in fields.items() if value), key.name])


def _moment(moment: datetime | None) -> str:
    return "" if moment is None else moment.isoformat(timespec="seconds")


def _bounded(value: float, option: str, most: float) -> float:
    if not 0 <= value <= most:
        raise SettingsInvalid(f"{option}: give a number from 0 to {most:g}.")
    return value


def _say(text: str) -> None:
    # The key alone goes to stdout, for programs.
    sys.stderr.write(f"{text}\n")
