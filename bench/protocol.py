"""The protocol of every timing: rivals take turns in one process, and ratios are of one run.

One warm-up round is not counted. Then A B C, A B C, ...: what disturbs the machine disturbs all alike.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pocl.models.precision import Precision, choose_device, choose_precision

Work = Callable[[], object]
OURS = "ours"


@dataclass(frozen=True)
class Rival:
    """One way of doing the work that is compared."""

    name: str
    prepare: Callable[[], Work]
    """Does all that is not measured, and returns what is: one unit of work, to be called any number of times."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one rival, a figure for each round that counts."""

    name: str
    seconds: tuple[float, ...]
    first: float | None = None
    """Seconds of the warm-up round."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    @property
    def iqr(self) -> float:
        """Distance between the quartiles; 0 for a single round."""
        if len(self.seconds) == 1:
            return 0.0
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return upper - lower


def time_interleaved(
    rivals: Sequence[Rival],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Prepare all rivals, warm each up once, and time `rounds` interleaved rounds.

    Without `warm_up` the first round counts: for work so long that what is slow at first does not tell.

    Raises:
        ValueError: without a round, or where two rivals have one name.
    """
    if rounds < 1 or len({rival.name for rival in rivals}) != len(rivals):
        raise ValueError("rounds must be at least 1 and names distinct")
    works = {rival.name: rival.prepare() for rival in rivals}
    first = {name: _timed(work, clock) for name, work in works.items()} if warm_up else {}
    counted: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            counted[name].append(_timed(work, clock))
    return {name: Timing(name, tuple(seconds), first.get(name)) for name, seconds in counted.items()}


def add_timing_arguments(parser: argparse.ArgumentParser, *, rounds: int = 5, memory: bool = True) -> None:
    """`--rounds`, `--dtype` and, where it is measured, `--no-memory`, for commands that time rivals."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds that count (default {rounds})")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of matrix products")
    if memory:
        parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of each rival")


def precision_of(args: argparse.Namespace) -> Precision:
    """`auto` is what the hardware multiplies: bf16 or fp32."""
    return choose_precision(args.dtype, choose_device("cpu"))


def pin_threads(threads: int | None) -> int:
    """Fix the number of threads, and the cores that they run on; the number that it came to.

    To be called before torch has started threads of its own, which then stay on the same cores.
    """
    allowed = sorted(os.sched_getaffinity(0))
    count = min(threads or len(allowed), len(allowed))
    os.sched_setaffinity(0, allowed[:count])
    torch.set_num_threads(count)
    return count


def _timed(work: Work, clock: Callable[[], float]) -> float:
    # What another rival left behind is collected outside of the time.
    gc.collect()
    start = clock()
    work()
    return clock() - start
