"""The arithmetic of the protocol, on a simulated clock."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.agreement import difference, require_agreement
from bench.memory import Memory, measure_peak
from bench.plot import draw, load_bars
from bench.protocol import OURS, Rival, Timing, Work, time_interleaved
from bench.report import Report, table, timing_rows, to_json


class Clock:
    """A clock that advances only while a rival works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def rival(self, name: str, *seconds: float) -> Rival:
        remaining = list(seconds)

        def work() -> None:
            self.order.append(name)
            self.now += remaining.pop(0)

        return Rival(name, lambda: work)


def test_rounds_are_interleaved_and_the_warm_up_does_not_count() -> None:
    clock = Clock()
    rivals = [clock.rival("a", 100, 1, 2, 3), clock.rival("b", 200, 4, 5, 9)]
    timings = time_interleaved(rivals, 3, clock)
    assert clock.order == ["a", "b"] * 4
    assert timings["a"] == Timing("a", (1, 2, 3), 100)
    assert timings["b"].seconds == (4, 5, 9)


def test_without_warm_up_the_first_round_counts() -> None:
    clock = Clock()
    assert time_interleaved([clock.rival("a", 7)], 1, clock, warm_up=False)["a"] == Timing("a", (7,), None)


def test_preparation_is_not_timed() -> None:
    clock = Clock()

    def prepare() -> Work:
        clock.now += 50
        return clock.rival("a", 1, 1).prepare()

    assert time_interleaved([Rival("a", prepare)], 1, clock)["a"].seconds == (1,)


@pytest.mark.parametrize("rounds", [0, -1])
def test_less_than_one_round_is_refused(rounds: int) -> None:
    with pytest.raises(ValueError, match="rounds"):
        time_interleaved([], rounds)


def test_median_minimum_and_quartiles() -> None:
    timing = Timing("a", (5.0, 1.0, 2.0, 3.0, 4.0))
    assert (timing.median, timing.fastest, timing.iqr) == (3.0, 1.0, 2.0)
    assert Timing("a", (5.0,)).iqr == 0


def test_ratios_charge_ours_for_work_done_once() -> None:
    timings = {OURS: Timing(OURS, (1.0, 2.0, 3.0)), "b": Timing("b", (8.0, 4.0, 6.0))}
    memories = {OURS: Memory(100, 300), "b": Memory(100, 900)}
    ours, theirs = timing_rows(timings, memories, once=1.0)
    assert ours["times_ours"] == ours["times_ours_min"] == ours["times_ours_peak"] == 1
    assert theirs["times_ours"] == 6 / (2 + 1)
    assert theirs["times_ours_min"] == 4 / (1 + 1)
    assert theirs["times_ours_peak"] == 4


def test_peak_memory_excludes_the_preparation() -> None:
    size = 64 << 20

    def prepare() -> Callable[[], object]:
        prepared = bytearray(b"1") * size
        return lambda: len(prepared) + len(bytearray(b"1") * size)

    assert measure_peak(Rival("a", prepare)).increase == pytest.approx(size, rel=0.1)


def test_a_table_is_aligned() -> None:
    lines = table([{"name": "ours", "median_s": 0.5}, {"name": "a longer name", "median_s": 1234.5}]).splitlines()
    assert lines == ["name           median s", "ours                0.5", "a longer name      1234"]


def test_rivals_with_different_results_are_refused() -> None:
    assert difference(1.0, 1.0 + 1e-9) < 1e-8
    require_agreement(1e-5, {"loss": 1e-6})
    require_agreement(None, {"loss": 1.0})
    for value in (1e-4, math.nan):
        with pytest.raises(SystemExit, match="loss"):
            require_agreement(1e-5, {"loss": value})


def test_results_are_drawn_as_bars(tmp_path: Path) -> None:
    rows = timing_rows({OURS: Timing(OURS, (1.0,)), "rival": Timing("rival", (3.0,))})
    (tmp_path / "step.json").write_text(to_json(Report("step", {"size": "ci"}, rows)))
    bars = load_bars(tmp_path)
    assert bars == [("step (ci): rival", 3.0)]
    draw(bars, tmp_path / "images" / "bench.svg")
    assert "3.0x" in (tmp_path / "images" / "bench.svg").read_text()
