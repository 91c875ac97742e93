"""Exit statuses of the command line, for scripts."""

from typing import Final

from pocl_client.errors import (
    ApiError,
    ClientError,
    DownloadDamaged,
    ExportFailed,
    ResponseInvalid,
    ServerFault,
    ServiceUnreachable,
    WaitTimedOut,
)

SUCCEEDED: Final = 0
FAILED: Final = 1
"""A job failed or was cancelled."""
REFUSED: Final = 2
"""The command line is wrong, or the service refuses what it asks for."""
UNREACHABLE: Final = 3
"""The service cannot be reached, or failed itself."""
TIMED_OUT: Final = 124
"""The time that was given is over, as `timeout` of the shell has it."""
STOPPED: Final = 130
"""Ctrl-C, as shells have it."""


def exit_status_of(error: ClientError) -> int:
    """The status that stands for an error."""
    if isinstance(error, WaitTimedOut):
        return TIMED_OUT
    if isinstance(error, (DownloadDamaged, ResponseInvalid, ServerFault, ServiceUnreachable)):
        return UNREACHABLE
    if isinstance(error, ExportFailed):
        return REFUSED if error.fault == "user" else UNREACHABLE
    if isinstance(error, ApiError) and error.status == 429:
        return UNREACHABLE
    return REFUSED


def exit_status_of_job(status: str) -> int:
    """The status that stands for how a job ended, or that of one that has not ended."""
    return FAILED if status in ("failed", "cancelled") else SUCCEEDED
