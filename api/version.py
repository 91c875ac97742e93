"""`GET /version`: what runs here."""

import re
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal

from fastapi import APIRouter

from api.dependencies import SettingsDep
from api.pagination import Resource
from domain.generations import GENERATION
from domain.schema import newest_revision

_CHECKOUT: Final = Path(__file__).resolve().parents[1] / ".git"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")

router = APIRouter(tags=["health"])


class Version(Resource):
    """What runs here."""

    version: str
    """The version of the service."""
    commit: str | None
    """The commit of the source (`POCL_COMMIT`, or that of the checkout); null where it is not known."""
    schema_revision: str
    """The newest revision of the database's schema that this version knows, and needs: `/readyz` says whether the
    database has it."""
    generation: int
    """What changes with each release that changes the schema, rows or messages: processes of two neighbouring
    generations work together, others refuse to start."""
    api: Literal["v1"] = "v1"
    """The version of the contract: the first part of the paths of all resources."""


@router.get("/version", summary="What runs here")
async def get_version(settings: SettingsDep) -> Version:
    """The version of the service, for clients that have no key yet and for whoever upgrades it. It names no path, no
    address and no secret, and asks neither database nor disk."""
    return build_info(settings.commit)


@cache
def build_info(commit: str | None = None) -> Version:
    """What runs here.

    Args:
        commit: the commit of the source, where it is known; that of the checkout unless given.
    """
    return Version(
        version=version("pocl-service"),
        commit=commit or _commit_of_checkout(_CHECKOUT),
        schema_revision=newest_revision(),
        generation=GENERATION,
    )


def _commit_of_checkout(directory: Path) -> str | None:
    """The commit that is checked out, by the files of git; null where this is no plain checkout."""
    try:
        head = (directory / "HEAD").read_text(encoding="ascii").strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head if _COMMIT.fullmatch(head) else None
        reference = directory / name
        if reference.exists():
            commit = reference.read_text(encoding="ascii").strip()
        else:
            packed = (directory / "packed-refs").read_text(encoding="ascii").splitlines()
            commit = next((line.split()[0] for line in packed if line.endswith(f" {name}")), "")
    except (OSError, UnicodeDecodeError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None
