"""Learning-rate curves and the order of samples: pure functions of the step, so that a resumed run recomputes them."""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def cosine(step: int, *, total: int, peak: float, floor: float, warmup: int = 0) -> float:
    """Learning rate of the step, counted from 0: linear warm-up to `peak`, then a half cosine down to `floor`.

    The first step after the warm-up has `peak`; the curve reaches `floor` at `step == total`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def shuffled(items: Sequence[T], *seeds: int) -> list[T]:
    """A permutation of `items` that depends on the seeds alone."""
    generator = torch.Generator().manual_seed(_combine_seeds(seeds))
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


def batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive batches of `size` items; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _combine_seeds(seeds: tuple[int, ...]) -> int:
    # A polynomial over a large prime: (seed, stage, epoch) must not collide for neighbouring values.
    combined = 0
    for seed in seeds:
        combined = (combined * 1_000_003 + seed + 1) % (2**61 - 1)
    return combined
