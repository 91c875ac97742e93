"""`pytest --unit`: the tests that need no server, no process and no long run, for `make unit`.

A test belongs to it unless

- it lies in one of `OTHER_DIRECTORIES`,
- it asks for one of `OTHER_FIXTURES`, by itself or through a fixture, or for a database on PostgreSQL,
- or it is marked `system` (it starts a process, or trains, draws, waits or sends requests for seconds), `slow` or
  `cuda`.

Properties are tried on fewer examples, where a test does not say on how many.

So a test that asks for a database is run on SQLite alone, and one that asks for none is run as it is. Nobody has to
believe the marks: while such a test is set up and called, in any run, the start of any process is an error.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OTHER_DIRECTORIES = ("api/http", "bench", "docs", "e2e", "faults", "fuzz", "integration")
OTHER_FIXTURES = {"postgres_server", "processes", "redis_server"}
_TESTS = Path(__file__).parents[1]
_forbidden = False
_STARTS = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen")


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--unit", action="store_true", help="only tests that need no server, no process and no long run")


def is_asked_for(config: pytest.Config) -> bool:
    return bool(config.getoption("--unit"))


def lies_elsewhere(path: Path) -> bool:
    """Whether a file or directory holds no unit tests, so that it need not even be imported."""
    return any(path.is_relative_to(_TESTS / directory) for directory in OTHER_DIRECTORIES)


def is_unit(item: pytest.Item) -> bool:
    """Whether a test belongs to a unit run."""
    if lies_elsewhere(item.path) or any(item.get_closest_marker(name) for name in ("slow", "system", "cuda")):
        return False
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    fixtures = item.fixturenames if isinstance(item, pytest.Function) else ()
    return parameters.get("backend") != "postgres" and OTHER_FIXTURES.isdisjoint(fixtures)


def deselect_others(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if not is_unit(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if is_unit(item)]


def watch_processes() -> None:
    """From now on have :func:`starting_no_process` look at the start of any process; for once in a run."""
    # An audit hook stays for good.
    sys.addaudithook(_refuse)


@contextmanager
def starting_no_process() -> Iterator[None]:
    """While the context lasts, the start of any process is an error."""
    global _forbidden
    _forbidden = True
    try:
        yield
    finally:
        _forbidden = False


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if _forbidden and event in _STARTS:
        raise RuntimeError(f"a unit test starts no process: {event} {arguments[:2]}. Mark it `system`.")
