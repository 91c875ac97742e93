"""How much of its work a run does at once: chosen once, after the models are loaded, and pinned in `spec.json`.

Larger sizes keep a device busier and take more memory. They change the rounding of a run and nothing else, so a
resumed run keeps those that it began with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from pocl.losses.buffers import CHUNK_TOKENS
from pocl.spec import DistillationSpec
from pocl.train.accumulation import MICRO_BATCH_TOKENS

CPU_GENERATION_ROWS = 16
"""Rows in flight of generation on a CPU."""
CPU_SCORING_TOKENS = 4096
"""Tokens that a CPU scores at once."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    micro_batch_tokens: int
    """The most prompt and response tokens of a micro-batch, padding included."""
    loss_chunk_tokens: int
    """The most response tokens whose logits are in memory at once."""
    generation_rows: int
    """Rows in flight of generation."""
    scoring_tokens: int
    """The most prompt and response tokens that are scored at once, padding included."""

    @classmethod
    def pinned_in(cls, spec: DistillationSpec) -> Self:
        """The sizes of a specification that names them all.

        Raises:
            ValueError: one of them is null.
        """
        training, evaluation = spec.training, spec.evaluation
        sizes = (
            training.micro_batch_tokens,
            training.loss_chunk_tokens,
            evaluation.batch_size,
            evaluation.scoring_tokens,
        )
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            raise ValueError("a size is not pinned yet")
        return cls(*known)

    @property
    def choices(self) -> Mapping[str, Mapping[str, int]]:
        """The sizes as fields of a specification, by part."""
        return {
            "training": {
                "micro_batch_tokens": self.micro_batch_tokens,
                "loss_chunk_tokens": self.loss_chunk_tokens,
            },
            "evaluation": {"batch_size": self.generation_rows, "scoring_tokens": self.scoring_tokens},
        }


def choose_sizes() -> Sizes:
    """The sizes for a CPU."""
    return Sizes(MICRO_BATCH_TOKENS, CHUNK_TOKENS, CPU_GENERATION_ROWS, CPU_SCORING_TOKENS)
