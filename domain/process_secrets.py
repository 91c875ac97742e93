"""Secrets in the environment of a process: kept from others, once the settings have been read.

What a process was started with stays readable in `/proc/PID/environ` for every process of the same user, whatever
Python removes from `os.environ`. It is overwritten here, in the memory that the kernel shows.
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import Final

from domain.process_stat import ENVIRONMENT_START, read_stat

SECRET_VARIABLES: Final = (
    "POCL_API_KEY",
    "POCL_METRICS_TOKEN",
    "POCL_HUB_WRITE_TOKEN",
    "POCL_DATABASE_URL",
    "POCL_DATABASE_PASSWORD",
    "POCL_REDIS_URL",
    "POCL_REDIS_PASSWORD",
    "POCL_RATE_LIMIT_REDIS_URL",
    "PGPASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
TRACKER_SECRETS: Final = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY", "DATABRICKS_TOKEN")
"""What the clients of trackers are given."""


def erase_secrets(names: tuple[str, ...] = (*SECRET_VARIABLES, *TRACKER_SECRETS)) -> None:
    """Overwrite the values of these variables where this process was given them. `os.environ` keeps them.

    Without Linux it does nothing.
    """
    if sys.platform != "linux":
        return
    try:
        given = Path("/proc/self/environ").read_bytes()
        start = read_stat("self", ENVIRONMENT_START)
    except (OSError, ValueError):
        return
    # Where the two do not agree the memory is not what we take it for.
    if not start or not given or ctypes.string_at(start, len(given)) != given:
        return
    offset = 0
    for entry in given.split(b"\0"):
        name, separator, value = entry.partition(b"=")
        if separator and value and os.fsdecode(name).upper() in names:
            ctypes.memset(start + offset + len(name) + 1, 0, len(value))
            # C code, and so children that inherit the environment, read the variable from a copy from now on.
            os.environ[os.fsdecode(name)] = os.fsdecode(value)
        offset += len(entry) + 1
