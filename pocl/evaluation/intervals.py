"""By how much the scores of two models differ on the same samples, with bootstrap intervals over the samples.

Both models answered the same samples, so a resample takes the scores of both from the same ones (paired bootstrap,
Efron and Tibshirani 1993; for scores of generated text Koehn 2004). The interval says how far the difference would move
with other samples of the same kind. It says nothing of another seed of the training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pocl.evaluation.row_scores import RowScores

Metric = Literal["rouge_l", "exact_match", "cross_entropy"]
METRICS: Final[tuple[Metric, ...]] = ("rouge_l", "exact_match", "cross_entropy")
RESAMPLES: Final = 1000
_MAX_DRAWS_AT_ONCE: Final = 1 << 22
_LEVEL: Final = 0.95
MIN_ROWS: Final = 10
"""Of fewer samples there is no interval: that of two which changed alike has no width, whatever others would do."""


class ScoreDifference(BaseModel):
    """By how much a model scores above another on the samples of one set, and the 95 % interval of that."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    split: str
    """The samples: `validation`, `test` or the name of an evaluation set."""
    model: Literal["final", "best"]
    """The student: after the last stage, or after the stage that `best/` holds."""
    compared_with: Literal["initial", "teacher"]
    """The student before training, or the teacher."""
    metric: Metric
    """The score: `rouge_l` and `exact_match` in points, or `cross_entropy` in nats a response token, where less is
    better."""
    difference: float
    """The score of the model minus that of the other."""
    low: float
    """The lower end of the interval."""
    high: float
    """The upper end of the interval."""
    rows: int
    """The number of samples that both were scored on one by one."""


@dataclass(frozen=True)
class Interval:
    """A difference of two means over the same samples, with the ends of its 95 % interval."""

    difference: float
    low: float
    high: float


def paired_interval(
    one: Sequence[float], other: Sequence[float], weights: Sequence[float] | None = None, *, seed: int
) -> Interval:
    """The difference of two means over the same samples, with its interval by percentiles of 1,000 resamples.

    Args:
        one: A score for each sample, of the first model.
        other: The same of the second.
        weights: Where each score is a sum, of how many tokens: the means are then over all tokens.
        seed: Of the resampling. Equal scores and seeds give equal intervals.

    Raises:
        ValueError: without a sample, or with unequal numbers of them.
    """
    gaps = np.subtract(one, other, dtype=np.float64)
    counts = np.ones_like(gaps) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(gaps) or len(gaps) != len(counts):
        raise ValueError("both models need a score for each sample, and there must be one")
    draw = np.random.default_rng(seed)
    at_once = max(1, _MAX_DRAWS_AT_ONCE // len(gaps))
    means: list[NDArray[np.float64]] = []
    for start in range(0, RESAMPLES, at_once):
        chosen = draw.integers(len(gaps), size=(min(at_once, RESAMPLES - start), len(gaps)))
        means.append(gaps[chosen].sum(axis=1) / np.maximum(counts[chosen].sum(axis=1), 1))
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return Interval(float(gaps.sum() / max(counts.sum(), 1)), float(low), float(high))


def score_intervals(one: RowScores, other: RowScores, *, seed: int) -> dict[Metric, Interval]:
    """The difference of each metric between two models on the same samples; empty where their samples differ, or where
    there are fewer than :data:`MIN_ROWS`.
    """
    if len(one.tokens) < MIN_ROWS or one.tokens != other.tokens:
        return {}
    return {
        metric: paired_interval(
            getattr(one, metric),
            getattr(other, metric),
            one.tokens if metric == "cross_entropy" else None,
            seed=seed,
        )
        for metric in METRICS
    }
