"""Where child processes find our packages: where this process found them, and never in their working directory.

`python -m` looks into the working directory first. A project of a user with a `worker.py`, an `api` package or
`migrations` of its own would then run in our place, so children are started with `-P`, which leaves that directory out.
"""

import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def module_command(python: str, module: str, *arguments: str) -> list[str]:
    """The command line that runs one of our modules."""
    return [python, "-P", "-m", module, *arguments]


def child_python_path(environ: Mapping[str, str], *, root: Path = _ROOT) -> str:
    """`PYTHONPATH` for a child process: the entries of this process's, absolute, and a checkout that is not installed.

    An empty entry stands for the working directory, and is left out.

    Args:
        root: the directory that our packages lie in.
    """
    entries = [os.path.abspath(entry) for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    installed = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    if str(root) not in (*entries, *installed):
        entries.append(str(root))
    return os.pathsep.join(entries)
