"""Differences of scores with their intervals against the normal distribution; warnings of constant scores."""

import random
from statistics import NormalDist, fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.evaluation.constant_scores import constant_metric, constant_ranking
from pocl.evaluation.intervals import paired_interval, score_intervals
from pocl.evaluation.row_scores import RowScores

SCORES = st.lists(st.floats(0, 100), min_size=1, max_size=30)


def row_scores(rouge_l: list[float], nats: list[float], tokens: list[int]) -> RowScores:
    return RowScores(
        rouge_l=tuple(rouge_l), exact_match=(0.0,) * len(tokens), cross_entropy=tuple(nats), tokens=tuple(tokens)
    )


@given(SCORES, st.randoms(), st.integers(0, 2**31 - 1))
def test_interval_encloses_no_more_than_the_data_and_turns_with_its_sign(
    scores: list[float], rng: random.Random, seed: int
) -> None:
    others = [rng.uniform(0, 100) for _ in scores]
    interval = paired_interval(scores, others, seed=seed)
    gaps = [one - other for one, other in zip(scores, others, strict=True)]
    assert interval.difference == pytest.approx(fmean(gaps))
    assert min(gaps) - 1e-9 <= interval.low <= interval.high <= max(gaps) + 1e-9
    assert paired_interval(scores, others, seed=seed) == interval
    turned = paired_interval(others, scores, seed=seed)
    assert (turned.low, turned.high) == pytest.approx((-interval.high, -interval.low))
    equal = paired_interval(scores, scores, seed=seed)
    assert (equal.difference, equal.low, equal.high) == (0, 0, 0)


def test_interval_of_many_samples_is_that_of_the_normal_distribution() -> None:
    rng = random.Random(0)
    scores, others = ([rng.gauss(mean, 20) for _ in range(2000)] for mean in (50, 45))
    gaps = [one - other for one, other in zip(scores, others, strict=True)]
    interval = paired_interval(scores, others, seed=10)
    half = NormalDist().inv_cdf(0.975) * stdev(gaps) / len(gaps) ** 0.5
    assert interval.low == pytest.approx(fmean(gaps) - half, abs=0.1 * half)
    assert interval.high == pytest.approx(fmean(gaps) + half, abs=0.1 * half)


def test_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    rng = random.Random(1)
    covered = 0
    for trial in range(200):
        gaps = [rng.gauss(3, 10) for _ in range(60)]
        interval = paired_interval(gaps, [0.0] * 60, seed=trial)
        covered += interval.low <= 3 <= interval.high
    assert 180 <= covered <= 199


def test_cross_entropy_is_compared_per_token_and_not_per_sample() -> None:
    one = row_scores([0, 100] * 5, [10.0, 2.0] * 5, [10, 1] * 5)
    other = row_scores([0, 0] * 5, [20.0, 3.0] * 5, [10, 1] * 5)
    intervals = score_intervals(one, other, seed=10)
    assert intervals["cross_entropy"].difference == pytest.approx(12 / 11 - 23 / 11)
    assert intervals["rouge_l"].difference == 50


def test_models_scored_on_other_samples_are_not_compared() -> None:
    ten = row_scores([1, 2] * 5, [1, 2] * 5, [1, 2] * 5)
    assert score_intervals(ten, ten, seed=10) != {}
    assert score_intervals(ten, row_scores([1, 2] * 5, [1, 2] * 5, [1, 3] * 5), seed=10) == {}


@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_few_samples_have_no_interval(rows: int) -> None:
    # All of them changed alike, so that the interval of any resampling would have no width.
    better, worse = (
        row_scores([60.0] * rows, [1.0] * rows, [1] * rows),
        row_scores([50.0] * rows, [2.0] * rows, [1] * rows),
    )
    assert score_intervals(better, worse, seed=10) == {}


@pytest.mark.parametrize(
    ("scores", "code"),
    [
        ([0.0], "ranking_mostly_zero"),
        ([0.0, 0.0], "ranking_mostly_zero"),
        ([7.0, 7.0], "ranking_constant"),
        ([0.0, 0.0, 1.0], "ranking_mostly_zero"),
        ([0.0, 1.0], None),
        ([], None),
        ([5.0], None),
    ],
)
def test_ranking_by_zeros_is_warned_of(scores: list[float], code: str | None) -> None:
    warning = constant_ranking(scores)
    assert code == (None if warning is None else warning.code)


@pytest.mark.parametrize(
    ("scores", "warns"), [([0.0] * 3, True), ([100.0] * 2, True), ([0.0, 0.1], False), ([4.0], False)]
)
def test_metric_that_is_the_same_for_each_sample_is_warned_of(scores: list[float], warns: bool) -> None:
    warning = constant_metric("rouge_l", scores, model="student", samples="test samples")
    assert (warning is not None) is warns
    assert warning is None or warning.code == "metric_constant"
