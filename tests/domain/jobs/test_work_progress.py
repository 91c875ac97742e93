"""The share of the work that is done: planned part by part, and never falling."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.jobs.work_progress import PlannedPart, WorkPlan, forecast_time_left
from pocl.estimate import Estimate, ModelSize, ModelSizes, SetSize, estimate
from pocl.plan import stage_table
from pocl.spec import resolve

PHASES = ("ranking", "evaluating", "caching_teacher")
SETS = {name: SetSize(40, 4000, 2000, 2000) for name in ("train", "validation", "test")}


def estimated(ranker: ModelSize | None = None, **changes: object) -> Estimate:
    raw = {
        "preset": "quick",
        "teacher": {"random": {"layers": 4}},
        "student": {"random": {"layers": 2}},
        "data": {
            "train": {"dataset": "ds_00000001"},
            "validation": {"dataset": "ds_00000002"},
            "test": {"dataset": "ds_00000003"},
        },
        **changes,
    }
    spec = resolve(raw)
    sizes = ModelSizes(ModelSize(2000, 1000, 2, 16, 100), ModelSize(4000, 2000, 4, 16, 100), ranker)
    return estimate(spec, stage_table(spec, 40), sizes, SETS)


def shares(plan: WorkPlan) -> Iterator[tuple[tuple[str, str | None, str | None], float]]:
    before = 0.0
    for part in plan.as_stored():
        yield (part["phase"], part["subject"], part["samples"]), part["until"] - before
        before = part["until"]


def test_parts_have_the_shares_of_their_operations_in_the_order_of_a_run() -> None:
    plan = estimated()
    found = dict(shares(WorkPlan.from_estimate(plan)))
    assert list(found) == [
        ("ranking", None, None),
        ("evaluating", "teacher", "validation"),
        ("evaluating", "teacher", "test"),
        ("caching_teacher", None, None),
        ("evaluating", "initial", "validation"),
        ("evaluating", "initial", "test"),
        ("training", None, None),
    ]
    assert plan.flops is not None
    for phase in ("ranking", "caching_teacher"):
        flops = sum(each.flops or 0 for each in plan.passes if each.phase == phase)
        assert found[phase, None, None] == pytest.approx(flops / plan.flops)
    initial = sum(each.flops or 0 for each in plan.passes if (each.subject, each.part) == ("initial", "test"))
    assert found["evaluating", "initial", "test"] == pytest.approx(initial / plan.flops)
    assert sum(found.values()) == pytest.approx(1)


def test_where_the_size_of_a_model_is_not_known_tokens_count() -> None:
    ranker = {"ranking": {"ranker": {"kind": "model", "model": {"hub": {"repo": "acme/ranker"}}}}}
    plan = estimated(curriculum=ranker)
    assert plan.flops is None
    tokens = sum(each.tokens for each in plan.passes)
    ranked = sum(each.tokens for each in plan.passes if each.phase == "ranking")
    assert dict(shares(WorkPlan.from_estimate(plan)))["ranking", None, None] == pytest.approx(ranked / tokens)


def test_without_an_estimate_every_phase_still_counts_and_without_a_plan_the_steps_alone() -> None:
    assumed = WorkPlan.from_estimate(None)
    assert all(assumed.within(0, phase, 1, 1) > 0 for phase in PHASES)
    by_steps = WorkPlan.from_stored(None)
    assert [by_steps.within(0, phase, 1, 1) for phase in PHASES] == [0, 0, 0]
    assert by_steps.at_step(5, 20) == 25


PLANS = st.sampled_from([WorkPlan.from_estimate(estimated()), WorkPlan.from_estimate(None), WorkPlan.from_stored(None)])
PROGRESS = st.tuples(st.sampled_from(PHASES), st.integers(0, 9), st.integers(0, 9))


@given(PLANS, st.lists(PROGRESS, max_size=30), st.floats(0, 100))
def test_whatever_a_phase_reports_the_share_stays_within_its_part_and_never_falls(
    plan: WorkPlan, reports: list[tuple[str, int, int]], percent: float
) -> None:
    before_training = max(percent, plan.at_step(1, 10**9) + 1e-6)
    for phase, done, total in reports:
        moved = plan.within(percent, phase, done, total)
        assert percent <= moved <= before_training
        percent = moved


@given(PLANS, st.integers(0, 50), st.integers(0, 50), st.integers(0, 40))
def test_the_share_rises_with_the_steps_to_all(plan: WorkPlan, first: int, second: int, total: int) -> None:
    low, high = (plan.at_step(step, total) for step in sorted((first, second)))
    assert 0 <= low <= high <= 100
    assert total == 0 or plan.at_step(total, total) == pytest.approx(100)


@pytest.mark.parametrize(
    ("percent", "elapsed", "left"),
    [
        (0, None, (100, 200, 400)),
        (10, None, (90, 180, 360)),
        # Too little is done to tell.
        (4, 90, (96, 192, 384)),
        (10, 30, (90, 270, 360)),
        # Beyond the range of the forecast what took the time was no work, such as loading, or was in a cache.
        (10, 90, (90, 360, 360)),
        (10, 1, (90, 90, 360)),
        (100, 150, (0, 0, 0)),
        (120, None, (0, 0, 0)),
    ],
)
def test_the_time_that_is_left_is_forecast_and_then_measured(
    percent: float, elapsed: float | None, left: tuple[float, float, float]
) -> None:
    duration = {"low_seconds": 100.0, "expected_seconds": 200.0, "high_seconds": 400.0}
    forecast = forecast_time_left({"duration": duration}, percent, elapsed)
    assert forecast is not None
    assert (forecast.low, forecast.expected, forecast.high) == pytest.approx(left)
    assert forecast_time_left({"duration": None}, percent, elapsed) is forecast_time_left(None, percent) is None


def test_a_plan_is_stored_without_loss() -> None:
    parts = [PlannedPart("ranking", 0.5), PlannedPart("training", 1.0)]
    assert WorkPlan.from_stored({"work": WorkPlan(parts).as_stored()}).as_stored() == WorkPlan(parts).as_stored()
