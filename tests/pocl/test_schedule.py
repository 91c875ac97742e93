"""Learning-rate curves and sample order."""

import math
from itertools import pairwise, product
from typing import Literal

from hypothesis import given
from hypothesis import strategies as st

from pocl.evaluation.scores import Scores
from pocl.events import Evaluated
from pocl.spec import AllSamples, ReversedOrder, ShuffledStages, Training, resolve
from pocl.train.eta import EtaEstimator
from pocl.train.evaluations import StudentEvaluations, StudentScoring
from pocl.train.schedule import batches, cosine, shuffled, training_order
from pocl.train.selection import best_chosen_by, best_epoch, best_stage, has_converged
from pocl.train.state import TrainState

LastBatch = Literal["partial", "even", "drop"]


def test_cosine_goes_from_peak_through_the_middle_to_the_floor() -> None:
    curve = [cosine(step, total=100, peak=1e-4, floor=1e-7) for step in (0, 50, 100)]
    assert math.isclose(curve[0], 1e-4)
    assert math.isclose(curve[1], (1e-4 + 1e-7) / 2)
    assert math.isclose(curve[2], 1e-7)


@given(st.integers(0, 50), st.integers(1, 500))
def test_cosine_rises_during_warmup_and_falls_afterwards(warmup: int, total: int) -> None:
    steps = range(warmup + total + 1)
    curve = [cosine(step, total=warmup + total, peak=1.0, floor=0.1, warmup=warmup) for step in steps]
    assert curve[: warmup + 1] == sorted(curve[: warmup + 1])
    assert curve[warmup:] == sorted(curve[warmup:], reverse=True)
    assert all(0 < value <= 1 for value in curve)


@given(st.lists(st.integers()), st.integers(0, 2**31 - 1), st.integers(0, 50))
def test_shuffle_is_a_permutation_that_depends_on_its_seeds_alone(items: list[int], seed: int, epoch: int) -> None:
    assert shuffled(items, seed, epoch) == shuffled(items, seed, epoch)
    assert sorted(shuffled(items, seed, epoch)) == sorted(items)


def test_neighbouring_seeds_give_different_orders() -> None:
    orders = {tuple(shuffled(range(50), *seeds)) for seeds in product(range(3), repeat=3)}
    assert len(orders) == 27


@given(st.lists(st.integers()), st.integers(1, 9))
def test_batches_concatenate_to_the_items(items: list[int], size: int) -> None:
    pieces = batches(items, size)
    assert [item for piece in pieces for item in piece] == items
    assert all(len(piece) == size for piece in pieces[:-1])


@given(st.lists(st.integers(), min_size=1), st.integers(1, 9))
def test_even_batches_have_all_items_in_as_many_steps(items: list[int], size: int) -> None:
    pieces = batches(items, size, last_batch="even")
    assert [item for piece in pieces for item in piece] == items
    assert len(pieces) == len(batches(items, size))
    assert max(map(len, pieces)) <= min(size, min(map(len, pieces)) + 1)


@given(st.lists(st.integers(), min_size=1), st.integers(1, 9), st.sampled_from(["partial", "even", "drop"]))
def test_planned_steps_are_those_of_the_batches(items: list[int], size: int, last_batch: LastBatch) -> None:
    training = Training(batch_size=size, last_batch=last_batch)
    assert len(batches(items, size, last_batch=last_batch)) == training.steps_per_epoch(len(items))


@given(st.lists(st.integers(), min_size=1), st.integers(1, 9))
def test_dropped_samples_are_those_that_fill_no_batch(items: list[int], size: int) -> None:
    left = [item for piece in batches(items, size, last_batch="drop") for item in piece]
    assert left == (items[: len(items) // size * size] if len(items) >= size else items)


def test_warm_up_longer_than_the_schedule_reaches_the_peak_with_the_last_step() -> None:
    curve = [cosine(step, total=4, peak=1.0, floor=0.1, warmup=100) for step in range(4)]
    assert curve == [0.25, 0.5, 0.75, 1.0]


@given(st.permutations(range(9)), st.integers(0, 99))
def test_order_of_training_follows_from_the_control(ranking: list[int], seed: int) -> None:
    digests = [f"{(row * 7) % 9}" for row in range(9)]
    assert training_order(None, ranking, digests, seed) == ranking
    assert training_order(ReversedOrder(kind="reversed_order"), ranking, digests, seed) == ranking[::-1]
    # Without a ranking the order follows from the samples, wherever they stand in the file.
    by_digest = training_order(AllSamples(kind="all_samples"), [], digests, seed)
    assert [digests[row] for row in by_digest] == sorted(digests)
    moved = [digests[row] for row in ranking]
    shuffles = [training_order(ShuffledStages(kind="shuffled_stages"), [], each, seed) for each in (digests, moved)]
    assert [digests[row] for row in shuffles[0]] == [moved[row] for row in shuffles[1]]
    assert sorted(shuffles[0]) == list(range(9))


def test_best_epoch_is_the_last_of_equals() -> None:
    assert [best_epoch(scores) for scores in ([3.0], [3.0, 5.0, 4.0], [0.0, 0.0, 0.0])] == [1, 2, 3]


def test_convergence_requires_patience_scores_without_improvement() -> None:
    assert not has_converged([10.0], patience=1, min_delta=0.1)
    assert has_converged([10.0, 10.05], patience=1, min_delta=0.1)
    assert not has_converged([10.0, 10.05], patience=2, min_delta=0.1)
    assert not has_converged([10.0, 9.0, 10.2], patience=2, min_delta=0.1)
    assert has_converged([10.0, 9.0, 10.0], patience=2, min_delta=0.1)


def test_scores_of_zero_are_no_sign_of_convergence_until_another_came() -> None:
    assert not has_converged([0.0] * 9, patience=1, min_delta=0.1)
    assert not has_converged([0.0, 0.0, 3.0], patience=1, min_delta=0.1)
    assert has_converged([0.0, 3.0, 0.0], patience=1, min_delta=0.1)


def test_seconds_left_count_steps_and_evaluations() -> None:
    now = iter([0.0, 2.0, 2.0, 12.0, 12.0, 18.0])
    eta = EtaEstimator(clock=lambda: next(now))
    with eta.step(100):
        pass
    for kind in ("validation", "test"):
        with eta.evaluation(kind):
            pass
    assert eta.tokens_per_second == 50
    assert eta.seconds_left(steps=3, evaluations={"validation": 2, "test": 1}) == 6 + 20 + 6
    # What was not timed yet is taken to be like the others.
    assert eta.seconds_left(steps=0, evaluations={"other": 3}) == 3 * 8
    assert EtaEstimator().seconds_left(steps=1, evaluations={"validation": 1}) == 0


def test_evaluations_that_are_left_follow_from_the_samples_and_how_a_stage_ends() -> None:
    def score(split: str, *, sampled: bool) -> Scores:
        raise AssertionError(f"{split} scored, sampled: {sampled}")

    def left(advance: str, *splits: str) -> dict[str, int]:
        spec = resolve(
            {
                "teacher": {"random": {}},
                "student": {"random": {}},
                "data": {"train": {"path": "a"}, "validation": {"path": "b"}},
                "curriculum": {"advance": {"by": advance}},
            }
        )
        scoring = StudentScoring(score, splits) if splits else None
        evaluations = StudentEvaluations(scoring, spec, TrainState(), lambda _: None, EtaEstimator())
        return evaluations.count_left(stages=3, epochs=7)

    assert left("epochs") == {}
    assert left("epochs", "validation", "test") == {"validation": 3, "test": 3}
    assert left("epochs", "test") == {"test": 1}
    assert sum(left("convergence", "validation").values()) == 3 + 7


def test_best_stage_has_the_highest_named_score_and_the_earlier_of_equals() -> None:
    def scored(stage: int | None, rouge_l: float, exact_match: float, subject: str = "stage") -> Evaluated:
        return Evaluated.model_validate(
            {"subject": subject, "stage": stage, "rows": 1, "rouge_l": rouge_l, "exact_match": exact_match}
            | {"cross_entropy": 1.0}
        )

    evaluations = [scored(None, 99, 99, "teacher"), scored(0, 20, 3), scored(1, 25, 1), scored(1, 99, 99, "epoch")]
    evaluations.append(scored(2, 25, 3))
    assert best_stage(evaluations, "rouge_l") == 1
    assert best_stage(evaluations, "exact_match") == 0
    assert best_stage(evaluations[:1], "rouge_l") is None


def scored_stages(*scores: tuple[float, float], split: str = "validation") -> list[Evaluated]:
    """The evaluations of stages with ROUGE-L and cross-entropy."""
    return [
        Evaluated(subject="stage", split=split, stage=stage, rows=2, rouge_l=rouge, exact_match=0, cross_entropy=nats)
        for stage, (rouge, nats) in enumerate(scores)
    ]


def test_metric_that_is_the_same_after_every_stage_chooses_none() -> None:
    stages = scored_stages((0, 3.0), (0, 2.0), (0, 2.5))
    assert best_stage(stages, "rouge_l") == best_stage(stages, "exact_match") == 1
    assert best_chosen_by(stages, "rouge_l") == "cross_entropy"
    stages = scored_stages((0, 3.0), (4, 9.0), (0, 2.5))
    assert (best_stage(stages, "rouge_l"), best_chosen_by(stages, "rouge_l")) == (1, "rouge_l")
    assert best_chosen_by(stages[:1], "rouge_l") == "rouge_l"
    assert best_chosen_by([], "rouge_l") is None


def test_other_samples_than_those_of_validation_choose_no_stage() -> None:
    stages = [*scored_stages((5, 3.0), (4, 3.0)), *scored_stages((1, 3.0), (90, 1.0), split="test")]
    assert best_stage(stages, "rouge_l") == 0


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([1.0, 2.0])), min_size=1, max_size=8))
def test_best_stage_so_far_is_the_best_of_all_or_the_newest(scores: list[tuple[float, float]]) -> None:
    stages = scored_stages(*scores)
    best = [best_stage(stages[: count + 1], "rouge_l") for count in range(len(stages))]
    assert all(later in (earlier, index) for index, (earlier, later) in enumerate(pairwise(best), start=1))
