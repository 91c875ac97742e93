"""Scores that tell no two models or samples apart, because all of them are equal: what is said about them."""

from collections.abc import Sequence
from typing import Final

from pocl.events import Warned

MAX_SHARE_OF_ZEROS = 0.5
"""The share of samples above which a ranking whose ROUGE-L is 0 is warned of."""

_RANKER: Final = "/curriculum/ranking/ranker"


def is_constant(scores: Sequence[float]) -> bool:
    """Whether every sample has the same score. A single sample has one if it is 0."""
    return len(set(scores)) == 1 and (len(scores) > 1 or scores[0] == 0)


def constant_metric(metric: str, scores: Sequence[float], *, model: str, samples: str) -> Warned | None:
    """The warning that a metric is the same for every sample; None where it is not.

    Args:
        model: What answered, for people.
        samples: What it answered, for people.
    """
    if not is_constant(scores):
        return None
    return Warned(
        code="metric_constant",
        message=(
            f"{metric} is {scores[0]:g} for each of the {len(scores)} {samples} that the {model} answered, so it "
            "tells no models apart: no stage ends by it, and stages of equal scores are compared by cross-entropy"
        ),
    )


def constant_ranking(scores: Sequence[float]) -> Warned | None:
    """The warning that ROUGE-L hardly ranks the training samples; None where it does.

    Args:
        scores: ROUGE-L of the answer to each training sample.
    """
    zeros = sum(score == 0 for score in scores)
    if zeros > MAX_SHARE_OF_ZEROS * len(scores):
        message = (
            f"ROUGE-L is 0 for {zeros} of {len(scores)} training samples, so that cross-entropy alone tells these "
            "apart: another curriculum.ranking.ranker may tell more"
        )
        return Warned(code="ranking_mostly_zero", message=message, pointer=_RANKER)
    if is_constant(scores):
        message = (
            f"ROUGE-L is {scores[0]:g} for each of the {len(scores)} training samples, so that cross-entropy alone "
            "ranks them: another curriculum.ranking.ranker may tell more"
        )
        return Warned(code="ranking_constant", message=message, pointer=_RANKER)
    return None
