"""A sign of life for a supervisor of containers: `python -m worker.liveness FILE` fails unless the file is fresh.

A worker that is frozen, or that waits for a broker that is away, is a live process like any other; only its main loop
stands still. Imports nothing but the standard library, since it is asked every few seconds.
"""

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FRESH_SECONDS = 60
BEAT_SECONDS = 10


@dataclass(frozen=True)
class Liveness:
    """A file that says when a loop last turned, by the clock that all processes of a machine share."""

    file: Path

    def beat(self) -> None:
        written = self.file.with_name(f".{self.file.name}-{os.getpid()}")
        # Where it cannot be written it grows old, which is what it is for; the loop goes on.
        with suppress(OSError):
            written.write_text(repr(time.monotonic()), encoding="ascii")
            # Replaced, so that nobody reads half a number.
            os.replace(written, self.file)

    def is_fresh(self) -> bool:
        """Whether it beat within the last minute. A file of an earlier boot lies in the future or is old."""
        try:
            age = time.monotonic() - float(self.file.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return False
        return 0 <= age <= FRESH_SECONDS


if __name__ == "__main__":
    sys.exit(not Liveness(Path(sys.argv[1])).is_fresh())
