"""Peak memory of one rival, in a process of its own: `python -m bench.memory COMMAND RIVAL SETTINGS`."""

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
    """Resident bytes."""

    prepared: int
    """Once all is loaded, before the work."""
    peak: int
    """At the highest point of the work."""

    @property
    def above(self) -> int:
        return max(0, self.peak - self.prepared)


def measure_peak(rival: Rival) -> Memory:
    """Prepare `rival` and do its work once in this process."""
    work = rival.prepare()
    gc.collect()
    # What the preparation freed goes back to the system: the work could take it unseen.
    ctypes.CDLL(None).malloc_trim(0)
    # Forgets the peak of the preparation.
    Path("/proc/self/clear_refs").write_text("5")
    prepared = _status("VmRSS")
    work()
    return Memory(prepared, _status("VmHWM"))


def peak_memories(args: Namespace, names: Sequence[str]) -> dict[str, Memory] | None:
    """The peak of each rival of the command that `args` were given to; None where they ask for none."""
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


def _status(field: str) -> int:
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
