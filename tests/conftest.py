"""How a run of the tests is configured: its settings, what it collects, and what it says at its end."""

import os
from collections.abc import Generator
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import structlog

from tests.support import cuda_run, unit_run
from tests.support.databases import counted_by_database, refuse_half_covered, selects_variants

# Where the service's packages are absent, as on a machine that only runs the tests marked `cuda`, so are its fixtures.
pytest_plugins = ["tests.support.service_fixtures"] if find_spec("sqlalchemy") else []


def pytest_addoption(parser: pytest.Parser) -> None:
    unit_run.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    unit_run.watch_processes()
    # A slow machine is no failure: no test asserts wall-clock time.
    hypothesis.settings.register_profile("whole", deadline=None)
    hypothesis.settings.register_profile("unit", deadline=None, max_examples=10)
    hypothesis.settings.load_profile("unit" if unit_run.is_asked_for(config) else "whole")
    # Structlog's default draws every traceback with its locals in boxes, which takes a second.
    renderer = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], renderer])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    lies_elsewhere = unit_run.is_asked_for(config) and unit_run.lies_elsewhere(collection_path)
    return True if lies_elsewhere or (cuda_run.is_asked_for(config) and cuda_run.holds_none(collection_path)) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not selects_variants(config.args, last_failed=config.getoption("lf", False)):
        refuse_half_covered(items)
    cuda_run.skip_without_gpu(items)
    if unit_run.is_asked_for(config):
        unit_run.deselect_others(config, items)
    slowest_first(items, workers=int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def slowest_first(items: list[pytest.Item], *, workers: int) -> None:
    """Have each of several processes begin with its share of the slow tests, lest one of them be left to the end.

    The processes begin with equal parts of the list. Of slow tests those with the longest time limit come first.
    """

    def limit(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return float(mark.args[0]) if mark is not None else 0.0

    slow = sorted((item for item in items if item.get_closest_marker("slow")), key=limit, reverse=True)
    others = [item for item in items if not item.get_closest_marker("slow")]
    if not (slow and others):
        return
    ends = [len(items) * part // workers for part in range(workers + 1)]
    ordered: list[pytest.Item] = []
    for part, (start, end) in enumerate(pairwise(ends)):
        share = slow[part::workers]
        count = max(0, end - start - len(share))
        ordered += [*share, *others[:count]]
        del others[:count]
    items[:] = [*ordered, *others]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    with unit_run.starting_no_process() if unit_run.is_unit(item) else nullcontext():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    with unit_run.starting_no_process() if unit_run.is_unit(item) else nullcontext():
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = counted_by_database([report.nodeid for report in terminalreporter.stats.get("passed", [])])
    if any(counts.values()):
        terminalreporter.write_line("databases: " + ", ".join(f"{n} passed on {name}" for name, n in counts.items()))
