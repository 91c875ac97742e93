"""Stage arithmetic: cumulative, total, rising, and controls of equal budget."""

from collections.abc import Mapping
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.errors import SpecInvalid
from pocl.plan import ModelSize, estimate, stage_table, subset_sizes
from pocl.spec import DistillationSpec, resolve

BASE = {"teacher": {"random": {}}, "student": {"random": {}}, "data": {"train": {"path": "rows.jsonl"}}}


def spec_with(curriculum: Mapping[str, object], batch_size: int = 64) -> DistillationSpec:
    return resolve(BASE | {"curriculum": curriculum, "training": {"batch_size": batch_size}})


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


@pytest.mark.parametrize("kind", ["no_curriculum", "shuffled_stages", "constant_temperature"])
def test_control_has_as_many_steps_as_its_curriculum(kind: str) -> None:
    curriculum = {"stages": 3, "epochs_per_stage": 2}
    real = stage_table(spec_with(curriculum, 7), 100)
    control = stage_table(spec_with(curriculum | {"control": {"kind": kind}}, 7), 100)
    assert sum(stage.steps for stage in control) == sum(stage.steps for stage in real)


def test_constant_temperature_control_keeps_the_rising_weight() -> None:
    curriculum = {"control": {"kind": "constant_temperature", "temperature": 1.5}}
    table = stage_table(spec_with(curriculum), 100)
    assert {stage.temperature for stage in table} == {1.5}
    assert table[0].kd_weight < table[-1].kd_weight


def test_more_stages_than_samples_are_refused_with_a_pointer() -> None:
    with pytest.raises(SpecInvalid) as caught:
        stage_table(spec_with({"stages": 5}), 4)
    assert caught.value.field_errors[0].pointer == "/curriculum/stages"


def test_sft_costs_no_teacher() -> None:
    sizes = {"teacher": ModelSize(10**9, 1000), "student": ModelSize(10**6, 1000)}
    costs = {}
    for method in ("sft", "forward_kl"):
        spec = resolve(BASE | {"method": method})
        costs[method] = estimate(spec, stage_table(spec, 100), **sizes)
    assert costs["sft"].memory_bytes < costs["forward_kl"].memory_bytes
    # The student reads a sample 20 times in the mean, the teacher once.
    assert costs["forward_kl"].training_flops == 100 * 512 * (20 * 6 * 10**6 + 2 * 10**9)
