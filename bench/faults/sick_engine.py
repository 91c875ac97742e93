"""An engine that fails by a fault of the system while a file exists, as on a worker whose GPU is lost.

    python bench/faults/sick_engine.py MARKER SPEC --workdir DIR ...

Without the file it is the engine itself, by the same arguments.
"""

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from pocl.events import RunEnded, to_line
from pocl.layout import EVENTS_FILE, ExitCode


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("marker", type=Path)
    parser.add_argument("--workdir", type=Path, required=True)
    options, _ = parser.parse_known_args()
    if not options.marker.exists():
        os.execv(sys.executable, [sys.executable, "-m", "pocl", "run", *sys.argv[2:]])
    ended = RunEnded(
        code="engine_failure",
        message="The device is lost.",
        fault="system",
        retryable=True,
        hint="Look at the machine.",
        step=0,
    )
    with (options.workdir / EVENTS_FILE).open("a", encoding="utf-8") as events:
        events.write(to_line(ended, datetime.now(UTC)) + "\n")
    return ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main())
