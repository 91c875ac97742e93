"""What of the file system an engine may read and write, enforced by Landlock where the kernel has it."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
import structlog

from domain.secret_files import secret_files
from domain.settings import Settings
from worker.engine_environment import hub_cache_directories
from worker.landlock import Landlock, landlock_version

_log = structlog.get_logger(__name__)

SandboxMode = Literal["auto", "off", "required"]


@contextmanager
def sandbox(
    mode: SandboxMode, settings: Settings, attempt: Path, environment: Mapping[str, str]
) -> Iterator[Callable[[], None] | None]:
    """What a child calls to give up its rights; None where it keeps them.

    It may read everything but the home of the service, the file of its database and the files of its secrets; of the
    home the models, artifacts and caches. It may write its own directory, the caches, devices and temporary files.

    Args:
        attempt: the directory of the attempt.
        environment: the environment of the engine, which says where its caches are.

    Raises:
        OSError: the mode is `required`, and the kernel does not enforce the rules.
    """
    if mode == "off" or (mode == "auto" and not landlock_version()):
        yield None
        return
    hidden = [*_hidden_paths(settings), *secret_files(os.environ)]
    caches = [settings.cache_root, *hub_cache_directories(environment)]
    for cache in caches:
        # A rule needs the directory. Where it cannot be made the engine could not write it either.
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
    try:
        rules = Landlock(
            hidden=hidden,
            readable=[*settings.model_roots, settings.artifact_root, *_program_paths(environment)],
            writable=[attempt, *caches, Path("/dev"), Path("/tmp"), Path(tempfile.gettempdir())],
        )
    except OSError as error:
        if mode == "required":
            raise
        _log.warning("engine_without_sandbox", error=str(error))
        yield None
        return
    try:
        yield rules.restrict_self
    finally:
        rules.close()


def _program_paths(environment: Mapping[str, str]) -> list[Path]:
    """Where the interpreter and the packages are, which may lie in the home of the service."""
    entries = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each]
    return [Path(each) for each in (sys.prefix, sys.base_prefix, os.path.dirname(sys.executable), *entries)]


def _hidden_paths(settings: Settings) -> list[Path]:
    hidden = [settings.home.resolve()]
    url = sa.make_url(settings.database_url)
    if url.get_backend_name() == "sqlite" and url.database:
        database = Path(url.database).resolve()
        hidden += [database.with_name(database.name + suffix) for suffix in ("", "-wal", "-shm", "-journal")]
    return hidden
