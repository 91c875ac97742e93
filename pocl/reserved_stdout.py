"""Standard output of a process whose reader is a program."""

import os
import sys
from typing import TextIO


def reserve_stdout() -> TextIO:
    """Reserve standard output for what is written to the returned file: what libraries print goes to standard error."""
    reserved = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return reserved
