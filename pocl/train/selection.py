"""Model selection: which epoch and which stage is the best, and when a stage has converged."""

from collections.abc import Sequence
from itertools import dropwhile
from typing import Final, Literal

from pocl.events import Evaluated

VALIDATION: Final = "validation"
"""The samples on which the best stage is chosen, and convergence is seen."""


def best_stage(evaluations: Sequence[Evaluated], metric: Literal["rouge_l", "exact_match"]) -> int | None:
    """The stage whose greedy answers to the validation samples score highest by `metric`; None without scores.

    Of stages with equal scores it is the one with the lower cross-entropy, and of equals the earlier. So a metric that
    is the same after every stage chooses nothing, and no later stage changes the order of earlier ones.
    """
    best = max(
        _stages_on_validation(evaluations),
        key=lambda evaluated: (float(getattr(evaluated, metric)), -evaluated.cross_entropy),
        default=None,
    )
    return None if best is None else best.stage


def best_epoch(scores: Sequence[float]) -> int:
    """The epoch with the highest score, counted from 1; of equals the last, which was trained longest."""
    return max(range(len(scores)), key=lambda index: (scores[index], index)) + 1


def best_chosen_by(
    evaluations: Sequence[Evaluated], metric: Literal["rouge_l", "exact_match"]
) -> Literal["rouge_l", "exact_match", "cross_entropy"] | None:
    """The score that decided which stage is the best: cross-entropy where `metric` is the same after every stage; None
    without scores.
    """
    values = [getattr(evaluated, metric) for evaluated in _stages_on_validation(evaluations)]
    if not values:
        return None
    return "cross_entropy" if len(values) > 1 and len(set(values)) == 1 else metric


def _stages_on_validation(evaluations: Sequence[Evaluated]) -> list[Evaluated]:
    return [each for each in evaluations if (each.subject, each.split) == ("stage", VALIDATION)]


def has_converged(scores: Sequence[float], *, patience: int, min_delta: float) -> bool:
    """Whether the last `patience` scores all failed to rise by `min_delta` over the best before them.

    Scores count from the first that is not 0: while every answer scores 0, nothing is known of how they improve.
    """
    scores = list(dropwhile(lambda score: score == 0, scores))
    if len(scores) <= patience:
        return False
    best_before = max(scores[:-patience])
    return max(scores[-patience:]) < best_before + min_delta
