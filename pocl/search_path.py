"""Importing this takes the working directory off the module search path, unless our packages lie in it.

For the modules that `python -m` runs: Python puts that directory first, and a `yaml.py` or an `api` package in it would
be imported in the place of ours. Imported before all that is not of the standard library.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def without_working_directory(path: Sequence[str], working_directory: str, root: Path) -> list[str]:
    """The search path without its first entry, where that is the working directory.

    Args:
        root: the directory that our packages lie in.
    """
    if not path or path[0] not in ("", working_directory) or Path(working_directory).resolve() == root:
        return list(path)
    return list(path[1:])


if not sys.flags.safe_path:
    sys.path[:] = without_working_directory(sys.path, os.getcwd(), Path(__file__).resolve().parents[1])
