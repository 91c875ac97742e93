"""The databases that a test runs on, and that every database test was collected for each of them."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest

DATABASES = ("sqlite", "postgres")


def selects_variants(arguments: Sequence[str], *, last_failed: bool) -> bool:
    """Whether this run collects single variants of a test: one is named, or those that failed are run again."""
    return last_failed or any("[" in argument for argument in arguments)


def refuse_half_covered(items: list[pytest.Item]) -> None:
    """Fail the run where a database test was collected for some of the databases only."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        if isinstance(item, pytest.Function) and "backend" in item.fixturenames:
            backend = item.callspec.params.get("backend", "none") if hasattr(item, "callspec") else "none"
            seen[item.nodeid.partition("[")[0]][str(backend)] += 1
    for test, counted in seen.items():
        if set(counted) != set(DATABASES) or len(set(counted.values())) != 1:
            raise pytest.UsageError(f"{test} must run on {' and '.join(DATABASES)}; collected {dict(counted)}")


def counted_by_database(nodeids: Sequence[str]) -> dict[str, int]:
    """How many of these tests ran on each database."""
    return {name: sum(name in _parameters(nodeid) for nodeid in nodeids) for name in DATABASES}


def _parameters(nodeid: str) -> list[str]:
    return nodeid.partition("[")[2].rstrip("]").split("-")
