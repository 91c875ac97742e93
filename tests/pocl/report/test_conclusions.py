"""What a report says first follows from the scores: what was gained, which weights to take, what is not shown."""

import pytest

from pocl.evaluation.intervals import ScoreDifference
from pocl.events import Evaluated
from pocl.report.conclusions import describe_conclusions


def evaluated(subject: str, rouge_l: float, *, stage: int | None = None, rows: int = 500) -> Evaluated:
    return Evaluated.model_validate(
        {
            "subject": subject,
            "stage": stage,
            "split": "validation",
            "rows": rows,
            "rouge_l": rouge_l,
            "exact_match": 0.0,
            "cross_entropy": 2.0,
        }
    )


def difference(split: str, low: float, high: float) -> ScoreDifference:
    return ScoreDifference(
        split=split,
        model="best",
        compared_with="initial",
        metric="rouge_l",
        difference=(low + high) / 2,
        low=low,
        high=high,
        rows=500,
    )


SCORES = [
    evaluated("teacher", 24.0),
    evaluated("initial", 4.0),
    evaluated("stage", 19.0, stage=0),
    evaluated("stage", 14.0, stage=1),
    evaluated("final", 14.0),
]


def test_best_weights_are_named_where_the_last_stage_is_worse() -> None:
    said = " ".join(describe_conclusions(SCORES, [], 0, is_control=False))
    assert "Take best/, the weights after stage 1 (ROUGE-L 19.00, cross-entropy 2.000)" in said
    assert "after the last stage they score 14.00" in said
    assert "50% of the way" in said
    same = " ".join(describe_conclusions(SCORES, [], 1, is_control=False))
    assert "The last stage is the best one" in same


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(1.0, 3.0, "gained 2.00 points"), (-3.0, -1.0, "lost 2.00 points"), (-1.0, 3.0, "so maybe nothing")],
)
def test_gain_is_said_with_its_interval(low: float, high: float, words: str) -> None:
    (first, *_) = describe_conclusions(SCORES, [difference("validation", low, high)], 0, is_control=False)
    assert words in first
    assert f"{low:+.2f} to {high:+.2f}" in first


def test_scores_of_samples_that_chose_nothing_count_more() -> None:
    said = describe_conclusions(SCORES, [difference("validation", 1, 3), difference("test", 2, 4)], 0, is_control=False)
    assert [sentence for sentence in said if "interval" in sentence] == [
        "The best student gained 3.00 points of ROUGE-L over the untrained one on 500 test samples"
        " (95 % interval +2.00 to +4.00)."
    ]


def test_what_a_run_does_not_show_is_said() -> None:
    assert "control of as many steps" in " ".join(describe_conclusions(SCORES, [], 0, is_control=False))
    assert "control of as many steps" not in " ".join(describe_conclusions(SCORES, [], 0, is_control=True))
    few = [evaluated("initial", 1.0, rows=16)]
    assert "So few samples" in " ".join(describe_conclusions(few, [], None, is_control=True))
    assert describe_conclusions([], [], None, is_control=False) == []
