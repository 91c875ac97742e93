"""Validation and test samples out of all samples, by their content."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pocl.errors import DatasetInvalid
from pocl.samples.sample import Sample

Part = Literal["train", "validation", "test"]


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
        getattr(splits, part_of(sample, validation=validation, test=test, seed=seed)).append(sample)
    return splits


def part_of(sample: Sample, *, validation: float, test: float, seed: int) -> Part:
    """The part that :func:`split_samples` takes a sample to."""
    draw = _draw(sample, seed)
    if draw < validation:
        return "validation"
    return "test" if draw < validation + test else "train"


def require_samples(sizes: Mapping[str, int], *, validation: float, test: float) -> None:
    """Check that every part that was asked for has samples.

    Args:
        sizes: the samples of each part.

    Raises:
        DatasetInvalid: naming the part that is empty.
    """
    shares = {"validation": validation, "test": test, "train": 1.0}
    for part, share in shares.items():
        if share and not sizes.get(part):
            raise DatasetInvalid(
                f"data.split leaves no sample for {part} out of {sum(sizes.values())}: "
                "give larger shares, or another seed."
            )


def _draw(sample: Sample, seed: int) -> float:
    """A number from 0 to 1 that looks random, and is the same for equal samples."""
    digest = hashlib.sha256(f"{seed} {sample.digest}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
