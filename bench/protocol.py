"""The protocol of every timing: rivals run in interleaved rounds of one process, and ratios are of one run.

One warm-up round is not counted. Then rivals run A B C, A B C, ...: a disturbance of the machine affects all alike.
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
    """One way of doing the work that is benchmarked."""

    name: str
    prepare: Callable[[], Work]
    """Does all that is not timed, and returns one unit of the work that is, to be called any number of times."""


@dataclass(frozen=True)
class Timing:
    """The seconds of one rival, one figure for each round that counts."""

    name: str
    seconds: tuple[float, ...]
    first: float | None = None
    """The seconds of the warm-up round; None without one."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    @property
    def iqr(self) -> float:
        """The interquartile range; 0 for a single round."""
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

    Without `warm_up` the first round counts, for work so long that its cold start does not matter.

    Raises:
        ValueError: without a round, or where two rivals have one name.
    """
    if rounds < 1 or len({rival.name for rival in rivals}) != len(rivals):
        raise ValueError("rounds must be at least 1 and names distinct")
    works = {rival.name: rival.prepare() for rival in rivals}
    first = {name: _timed(work, clock) for name, work in works.items()} if warm_up else {}
    seconds_by_rival: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds_by_rival[name].append(_timed(work, clock))
    return {name: Timing(name, tuple(seconds), first.get(name)) for name, seconds in seconds_by_rival.items()}


def add_timing_arguments(parser: argparse.ArgumentParser, *, rounds: int = 5, memory: bool = True) -> None:
    """Add `--rounds`, `--dtype` and, where memory is measured, `--no-memory` to a command that times rivals."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"number of rounds that count (default {rounds})")
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="format of matrix products (default auto)"
    )
    if memory:
        parser.add_argument("--no-memory", action="store_true", help="do not measure the peak memory of each rival")


def precision_of(args: argparse.Namespace) -> Precision:
    """The precision of `--dtype`; `auto` is bf16 where the hardware multiplies it, else fp32."""
    return choose_precision(args.dtype, choose_device("cpu"))


def pin_threads(threads: int | None) -> int:
    """Fix the number of threads and the cores that they run on (CPU affinity).

    To be called before torch has started threads of its own, which inherit the affinity.

    Returns:
        The number of threads.
    """
    allowed = sorted(os.sched_getaffinity(0))
    count = min(threads or len(allowed), len(allowed))
    os.sched_setaffinity(0, allowed[:count])
    torch.set_num_threads(count)
    return count


def _timed(work: Work, clock: Callable[[], float]) -> float:
    # The garbage of another rival is collected before the time starts.
    gc.collect()
    start = clock()
    work()
    return clock() - start
