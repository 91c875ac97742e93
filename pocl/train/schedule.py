"""Learning-rate curves and the order of samples: pure functions of the step, so that a resumed run recomputes them."""

import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch

from pocl.spec import Control, ReversedOrder, ShuffledStages

T = TypeVar("T")


def cosine(step: int, *, total: int, peak: float, floor: float, warmup: int = 0) -> float:
    """Learning rate of the step, counted from 0: linear warm-up to `peak`, then a half cosine down to `floor`.

    The first step after the warm-up has `peak`; the curve reaches `floor` at `step == total`. A warm-up of more steps
    than there are is cut to them, so that the last one has `peak`.
    """
    warmup = min(warmup, total)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def shuffled(items: Sequence[T], *seeds: int) -> list[T]:
    """A permutation of `items` that depends on the seeds alone."""
    generator = torch.Generator().manual_seed(_combine_seeds(seeds))
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


def training_order(control: Control | None, ranking: Sequence[int], digests: Sequence[str], seed: int) -> list[int]:
    """The rows of all samples in the order in which the stages take them.

    Args:
        ranking: The rows from easy to hard; empty where nothing is ranked.
        digests: Of each sample, by row. Where nothing is ranked they decide the order, and not the order of the file.
    """
    rows = list(ranking) or sorted(range(len(digests)), key=lambda row: (digests[row], row))
    if isinstance(control, ShuffledStages):
        return shuffled(rows, seed)
    if isinstance(control, ReversedOrder):
        return rows[::-1]
    return rows


def batches(
    items: Sequence[T], size: int, *, last_batch: Literal["partial", "even", "drop"] = "partial"
) -> list[Sequence[T]]:
    """Consecutive batches of at most `size` items.

    Args:
        last_batch: `partial`: the last batch may be shorter. `even`: as many batches, whose sizes differ by one at
            most. `drop`: items that fill no whole batch are left out, unless there would be no batch at all.
    """
    if last_batch == "drop" and len(items) >= size:
        items = items[: len(items) // size * size]
    if last_batch == "even":
        count = math.ceil(len(items) / size)
        return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]
    return [items[start : start + size] for start in range(0, len(items), size)]


def _combine_seeds(seeds: tuple[int, ...]) -> int:
    # A polynomial over a large prime: (seed, stage, epoch) must not collide for neighbouring values.
    combined = 0
    for seed in seeds:
        combined = (combined * 1_000_003 + seed + 1) % (2**61 - 1)
    return combined
