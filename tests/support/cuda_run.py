"""Tests marked `cuda`: skipped where torch sees no GPU; and `pytest -m cuda`, on a machine that has few packages.

Such a run imports only the files that hold such a test, since others need the packages of the service. A file holds one
if it names the mark itself or takes a device from :mod:`tests.support.device_parameters`.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

_NAMES_THE_MARK = re.compile(r"mark\.cuda\b|tests\.support\.device_parameters\b")


def is_asked_for(config: pytest.Config) -> bool:
    """Whether this run takes the tests marked `cuda` and no others."""
    return bool(config.option.markexpr == "cuda")


def holds_none(path: Path) -> bool:
    """Whether a file or directory holds no test marked `cuda`, so that it need not even be imported."""
    return not any(map(_names_the_mark, _test_files(path)))


def skip_without_gpu(items: Sequence[pytest.Item]) -> None:
    """Skip the tests marked `cuda` where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


def _test_files(path: Path) -> Sequence[Path]:
    return sorted(path.rglob("test_*.py")) if path.is_dir() else [path] if path.suffix == ".py" else []


@cache
def _names_the_mark(file: Path) -> bool:
    return bool(_NAMES_THE_MARK.search(file.read_text()))


def _has_gpu() -> bool:
    # Imported here: most runs collect no such test, and torch takes seconds to import.
    import torch

    return torch.cuda.is_available()
