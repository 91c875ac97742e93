"""A training state holds the metrics of a bounded number of steps, the same ones wherever a run was interrupted."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pocl.train.state import MAX_METRIC_ROWS, MetricRow, TrainState


def row(step: int) -> MetricRow:
    return MetricRow(
        step=step, stage=0, loss=step / 7, cross_entropy=1.0, divergence=None, temperature=1.0, learning_rate=0.1
    )


@given(st.integers(1, 3 * MAX_METRIC_ROWS), st.lists(st.integers(1, 3 * MAX_METRIC_ROWS), max_size=3))
@settings(max_examples=15)
def test_rows_are_bounded_and_do_not_depend_on_interruptions(steps: int, interruptions: list[int]) -> None:
    undisturbed, resumed = TrainState(), TrainState()
    for step in range(1, steps + 1):
        undisturbed.log(row(step))
        resumed.log(row(step))
        if step in interruptions:
            resumed = TrainState.model_validate_json(resumed.model_dump_json())
    assert resumed.metrics == undisturbed.metrics
    assert len(undisturbed.metrics) <= MAX_METRIC_ROWS
    assert undisturbed.metrics[-1] == row(steps)
    assert [each.step for each in undisturbed.metrics[:-1]] == list(range(1, steps, undisturbed.metric_stride))
    assert len(undisturbed.metrics) >= min(steps, MAX_METRIC_ROWS // 2)
