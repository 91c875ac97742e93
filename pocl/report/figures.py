"""The figures of a run that its report shows: stages and optimiser steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from pocl.spec import Method


class StageFigures(BaseModel):
    """A stage as it was trained."""

    model_config = ConfigDict(frozen=True)

    index: int
    samples: int
    temperature: float
    kd_weight: float
    method: Method
    inherited: bool
    """Whether another run trained it with another specification, and this run began with its weights: a branch."""
    steps: int
    end_step: int
    """Optimiser steps of the run at its end."""
    kept_epoch: int | None = None
    """How many of its epochs its weights were trained for, where they are those of its best epoch."""


@dataclass(frozen=True)
class TrainingCurve:
    """The optimiser steps; each sequence has one entry for each step."""

    steps: Sequence[int]
    loss: Sequence[float]
    cross_entropy: Sequence[float]
    divergence: Sequence[float | None]
    temperature: Sequence[float]
