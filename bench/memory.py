"""Peak memory of a rival, measured in a process of its own: `python -m bench.memory COMMAND RIVAL SETTINGS`."""

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.protocol import Rival, pin_threads

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Memory:
    """The resident memory of a rival, in bytes."""

    prepared: int
    """Memory after preparation, before the work."""
    peak: int
    """Peak memory during the work."""

    @property
    def increase(self) -> int:
        """What the work takes besides its preparation."""
        return max(0, self.peak - self.prepared)


def measure_peak(rival: Rival) -> Memory:
    """Prepare `rival` and do its work once in this process."""
    work = rival.prepare()
    gc.collect()
    return_freed_memory()
    # This resets the peak, which was that of the preparation.
    Path("/proc/self/clear_refs").write_text("5")
    prepared = status_bytes("VmRSS")
    work()
    return Memory(prepared, status_bytes("VmHWM"))


def peak_memories(args: Namespace, names: Sequence[str]) -> dict[str, Memory] | None:
    """The memory of each rival of the command with `args`; None with `--no-memory`."""
    if args.no_memory:
        return None
    return {name: _in_child(args, name) for name in names}


def _in_child(args: Namespace, name: str) -> Memory:
    settings = {key: value for key, value in vars(args).items() if isinstance(value, str | int | float | None)}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", args.command, name, json.dumps(settings)],
        stdout=subprocess.PIPE,
        env=environment,
        check=True,
    )
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def return_freed_memory() -> None:
    """Give what this process has freed back to the system, lest later work reuse it unnoticed."""
    ctypes.CDLL(None).malloc_trim(0)


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def main(command: str, name: str, settings: str) -> None:
    args = Namespace(**json.loads(settings))
    pin_threads(args.threads)
    rivals: list[Rival] = importlib.import_module(f"bench.{command}").rivals(args)
    (rival,) = (each for each in rivals if each.name == name)
    print(json.dumps(asdict(measure_peak(rival))))


if __name__ == "__main__":
    main(*sys.argv[1:])
