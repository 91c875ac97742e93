"""The liveness probe of a worker or scheduler: `python -m worker.liveness FILE` fails unless the file is fresh.

A worker that is frozen, or that waits for a broker that is away, is a live process like any other; only its main loop
stands still. This module imports nothing but the standard library, since the probe runs every few seconds.
"""

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAX_AGE_SECONDS = 60
BEAT_SECONDS = 10


@dataclass(frozen=True)
class Liveness:
    """A file with the time of a loop's last turn, by the monotonic clock that the processes of a machine share."""

    file: Path

    def beat(self) -> None:
        """Write the current time."""
        scratch = self.file.with_name(f".{self.file.name}-{os.getpid()}")
        # A file that cannot be written grows old, which fails the probe; the loop goes on.
        with suppress(OSError):
            scratch.write_text(repr(time.monotonic()), encoding="ascii")
            # Replaced as a whole, so that no reader finds half a number.
            os.replace(scratch, self.file)

    def is_fresh(self) -> bool:
        """Whether the last beat is at most `MAX_AGE_SECONDS` old. One of an earlier boot is old or in the future."""
        try:
            age = time.monotonic() - float(self.file.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return False
        return 0 <= age <= MAX_AGE_SECONDS


if __name__ == "__main__":
    sys.exit(not Liveness(Path(sys.argv[1])).is_fresh())
