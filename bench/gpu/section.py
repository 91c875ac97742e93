"""What a figure of the benchmark reports."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bench.gpu.scale import Scale
from bench.report import Figure, table
from pocl.models.precision import Precision

Say = Callable[[str], None]
"""Shows a line of progress."""


@dataclass(frozen=True)
class Setting:
    """What every figure is measured under."""

    scale: Scale
    precision: Precision
    peak_gflops: float | None
    """The rate of matrix products that was measured in this run; None where the precision has none."""
    say: Say

    @property
    def device(self) -> torch.device:
        return self.precision.device


@dataclass(frozen=True)
class Section:
    """A figure: a table, and what of it is held to a target."""

    title: str
    rows: Sequence[Mapping[str, Figure]]
    """The rows of the table, with equal keys."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """Measurements by the key of their target."""
    checks: Mapping[str, Figure] = field(default_factory=dict)
    """How far the results of the rivals differ."""
    notes: Sequence[str] = ()

    def text(self) -> str:
        parts = [self.title, table(self.rows), *(f"{name} {value:.2g}" for name, value in self.checks.items())]
        return "\n".join([*parts, *self.notes])
