"""What generation answers."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A prompt that is to be answered."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    limit: int
    """The most tokens of the answer, at least 1."""
    key: str
    """The random draws of the answer follow from it and the seed of the sampler."""
