"""How generated Python is formatted: as `make fix` would leave it."""

import subprocess
import sys
from pathlib import Path


def format_source(source: str, path: Path) -> str:
    """The source as ruff has it, with what it can correct corrected.

    Args:
        path: where the source is to be, by which ruff finds its settings.
    """
    for command in (["check", "--fix", "--exit-zero"], ["format"]):
        arguments = [sys.executable, "-m", "ruff", *command, "--quiet", f"--stdin-filename={path}", "-"]
        source = subprocess.run(arguments, input=source, capture_output=True, text=True, check=True).stdout
    return source
