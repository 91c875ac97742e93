"""What the client of a tracker does for the process that holds it, and how it says that it could not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Point = tuple[int, Mapping[str, float]]
"""An optimiser step, and the values of some series at it."""


class CannotTrack(Exception):
    """The tracker took nothing.

    Args:
        code: a stable name of the reason, for programs.
        message: one sentence for people, without addresses.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class OpenedRun:
    """A run that takes values."""

    run_id: str | None = None
    """Its id on the tracker's server; null for a file."""
    run_url: str | None = None
    """Where people see it; null where the tracker does not say."""
    last_steps: Mapping[str, int] | None = None
    """The last optimiser step of each series that it has; null where the tracker cannot tell."""


class TrackerClient(Protocol):
    """The client of one tracker, for any number of jobs. Every method may hang."""

    def open(self, run: Mapping[str, Any], directory: Path) -> OpenedRun:
        """Make the run of a job, or go on with the one that it has.

        Args:
            run: the fields of :class:`~domain.jobs.tracker_feed.TrackedRun`.
            directory: where files of the run may be.

        Raises:
            CannotTrack: with the reason.
        """

    def send(self, job_id: str, points: Sequence[Point]) -> None:
        """Send values to the run of a job.

        Raises:
            CannotTrack: with the reason.
        """

    def close(self, job_id: str, status: str, tags: Mapping[str, str]) -> Path | None:
        """End the run of a job once all values have arrived; the file that was made, if one is.

        Args:
            status: the state of the job, which need not have ended.
            tags: more tags for the run.

        Raises:
            CannotTrack: with the reason.
        """
