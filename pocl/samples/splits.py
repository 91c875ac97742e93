"""Validation and test samples out of all samples, by their content."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from pocl.samples.sample import Sample


@dataclass(frozen=True)
class Splits:
    """The samples of a run, each list in the order of its file."""

    train: list[Sample]
    validation: list[Sample] = field(default_factory=list)
    """They choose the best stage and when a stage ends."""
    test: list[Sample] = field(default_factory=list)
    """They choose nothing."""


def split_samples(samples: Iterable[Sample], *, validation: float, test: float, seed: int) -> Splits:
    """Split samples by their digests: each is drawn alone, so about the given shares become validation and test.

    Args:
        validation: the share of validation samples, from 0 to 1.
        test: the share of test samples; both together are at most 1.
        seed: another one draws otherwise.
    """
    splits = Splits([])
    for sample in samples:
        draw = _draw(sample, seed)
        if draw < validation:
            splits.validation.append(sample)
        elif draw < validation + test:
            splits.test.append(sample)
        else:
            splits.train.append(sample)
    return splits


def _draw(sample: Sample, seed: int) -> float:
    """A number from 0 to 1 that looks random, and is the same for equal samples."""
    digest = hashlib.sha256(f"{seed} {sample.digest}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
