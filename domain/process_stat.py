"""Numbers that the kernel tells about a process in `/proc/PID/stat`."""

from pathlib import Path
from typing import Final

PARENT: Final = 4
"""The number of the parent process (proc(5) counts fields from 1)."""
ENVIRONMENT_START: Final = 49
"""The address at which the environment that the process was started with begins (`env_start`)."""
_FIRST_AFTER_NAME: Final = 3


def read_stat(process: int | str, field: int) -> int:
    """A field of `/proc/PID/stat`.

    Args:
        process: the number of the process, or `self`.
        field: from 4 on, as proc(5) counts them.

    Raises:
        OSError: there is no such process, or no Linux.
        ValueError: the kernel does not tell it.
    """
    # The name of the program, in parentheses, may hold anything, parentheses and spaces included.
    fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    try:
        return int(fields[field - _FIRST_AFTER_NAME])
    except IndexError:
        raise ValueError(f"/proc/{process}/stat has no field {field}") from None
