"""Stage arithmetic: cumulative, total, rising, and controls of equal budget."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import accumulate
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.errors import SpecInvalid
from pocl.plan import stage_table, subset_sizes
from pocl.plan_warnings import plan_warnings
from pocl.spec import CONTROL_KINDS, DistillationSpec, resolve

BASE = {"teacher": {"random": {}}, "student": {"random": {}}, "data": {"train": {"path": "rows.jsonl"}}}


def spec_with(curriculum: Mapping[str, object], batch_size: int = 64, last_batch: str = "partial") -> DistillationSpec:
    return resolve(BASE | {"curriculum": curriculum, "training": {"batch_size": batch_size, "last_batch": last_batch}})


def test_paper_settings_give_twenty_epoch_equivalents_and_its_temperatures() -> None:
    table = stage_table(spec_with({}), 11_392)
    assert [stage.steps for stage in table] == [360, 712, 1072, 1424]
    assert [round(stage.temperature, 2) for stage in table] == [1.0, 1.33, 1.67, 2.0]
    assert [round(stage.kd_weight, 2) for stage in table] == [0.7, 0.8, 0.9, 1.0]
    assert sum(stage.samples * stage.epochs for stage in table) == 20 * 11_392


@given(st.data())
def test_subsets_are_cumulative_and_the_last_has_all_samples(data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, 20))
    samples = data.draw(st.integers(stages, 10_000))
    sizes = subset_sizes(samples, stages)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == samples
    assert all(size == samples // stages * (i + 1) for i, size in enumerate(sizes[:-1]))


@given(st.integers(1, 12), st.integers(12, 500), st.integers(1, 70), st.integers(1, 5))
def test_stages_are_consecutive_and_cover_every_epoch(stages: int, samples: int, batch: int, epochs: int) -> None:
    table = stage_table(spec_with({"stages": stages, "epochs_per_stage": epochs}, batch), samples)
    assert [stage.first_step for stage in table] == [sum(s.steps for s in table[:i]) for i in range(stages)]
    assert all(stage.steps == epochs * ceil(stage.samples / batch) for stage in table)


def test_single_stage_has_the_starting_temperature() -> None:
    (stage,) = stage_table(spec_with({"stages": 1}), 10)
    assert (stage.temperature, stage.kd_weight) == (1.0, 0.7)


ONE_THING: dict[str, set[str]] = {
    "all_samples": {"samples", "epochs", "steps_per_epoch"},
    "shuffled_stages": set(),
    "reversed_order": set(),
    "constant_temperature": {"temperature"},
    "constant_weight": {"kd_weight"},
}
"""The figures of a stage in which each control may differ from the curriculum; what else it changes is the order."""


@given(
    st.sampled_from(sorted(CONTROL_KINDS)),
    st.integers(1, 9),
    st.integers(9, 300),
    st.integers(1, 70),
    st.integers(1, 5),
    st.sampled_from(["partial", "even", "drop"]),
    st.lists(st.integers(1, 99), min_size=9, max_size=9) | st.none(),
)
def test_control_differs_from_its_curriculum_in_one_thing_and_has_its_steps(
    kind: str, stages: int, samples: int, batch: int, epochs: int, last_batch: str, spent: list[int] | None
) -> None:
    control: dict[str, object] = {"kind": kind}
    if spent is not None:
        control["stage_steps"] = spent[:stages]
    curriculum = {"stages": stages, "epochs_per_stage": epochs}
    staged = stage_table(spec_with(curriculum, batch, last_batch), samples)
    table = stage_table(spec_with(curriculum | {"control": control}, batch, last_batch), samples)
    budget = [stage.steps for stage in staged] if spent is None else spent[:stages]
    assert sum(stage.steps for stage in table) == sum(budget)
    assert [stage.first_step for stage in table] == list(accumulate((s.steps for s in table), initial=0))[:-1]
    assert all(0 <= stage.epochs * stage.steps_per_epoch - stage.steps < stage.steps_per_epoch for stage in table)
    if kind == "no_curriculum":
        assert [stage.samples for stage in table] == [samples]
        return
    assert [stage.steps for stage in table] == budget
    for ours, theirs in zip(table, staged, strict=True):
        changed = {name for name, value in asdict(ours).items() if value != asdict(theirs)[name]}
        assert changed <= ONE_THING[kind] | (set() if spent is None else {"steps", "first_step", "epochs"})
    assert kind != "all_samples" or {stage.samples for stage in table} == {samples}


def test_steps_of_a_job_are_refused_where_no_service_has_filled_them_in() -> None:
    control = {"kind": "reversed_order", "budget_of": "job_00000000"}
    with pytest.raises(SpecInvalid) as caught:
        stage_table(spec_with({"control": control}), 100)
    assert caught.value.field_errors[0].pointer == "/curriculum/control/budget_of"


def test_warm_up_that_covers_a_schedule_is_warned_of() -> None:
    def codes(**over: object) -> set[str]:
        spec = resolve(BASE | over)
        return {warning.code for warning in plan_warnings(spec, stage_table(spec, 256))}

    # The stages have 8, 16, 24 and 32 steps.
    assert "warmup_covers_schedule" not in codes(training={"warmup_steps": 7})
    assert "warmup_covers_schedule" in codes(training={"warmup_steps": 8})
    carried = {"optimizer_at_stage": "carry"}
    assert "warmup_covers_schedule" not in codes(curriculum=carried, training={"warmup_steps": 79})
    assert "warmup_covers_schedule" in codes(curriculum=carried, training={"warmup_steps": 80})


def test_small_last_batch_is_warned_of_unless_it_is_evened_out() -> None:
    def codes(samples: int, last_batch: str) -> set[str]:
        spec = spec_with({"stages": 1}, 8, last_batch)
        codes = {warning.code for warning in plan_warnings(spec, stage_table(spec, samples))}
        return codes - {"ranking_skipped", "no_validation"}

    assert codes(17, "partial") == {"small_last_batch"}
    assert codes(17, "even") == codes(16, "partial") == codes(22, "partial") == codes(7, "partial") == set()
    assert codes(15, "drop") == {"samples_dropped"}


@pytest.mark.parametrize(
    ("method", "weight", "expected"), [("js", 0.7, True), ("js", 1, False), ("reverse_kl", 0.7, False)]
)
def test_method_with_a_small_gradient_is_warned_of_where_it_is_mixed(
    method: str, weight: float, expected: bool
) -> None:
    spec = resolve(BASE | {"method": method, "curriculum": {"kd_weight": {"start": weight}}})
    codes = {warning.code for warning in plan_warnings(spec, stage_table(spec, 256))}
    assert ("divergence_gradient_small" in codes) == expected


def test_constant_temperature_control_keeps_the_rising_weight() -> None:
    curriculum = {"control": {"kind": "constant_temperature", "temperature": 1.5}}
    table = stage_table(spec_with(curriculum), 100)
    assert {stage.temperature for stage in table} == {1.5}
    assert table[0].kd_weight < table[-1].kd_weight


def test_more_stages_than_samples_are_refused_with_a_pointer() -> None:
    with pytest.raises(SpecInvalid) as caught:
        stage_table(spec_with({"stages": 5}), 4)
    assert caught.value.field_errors[0].pointer == "/curriculum/stages"
