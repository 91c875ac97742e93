"""The ranking: total, stable, blind to file order, and reused only for equal inputs."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.curriculum.journal import DifficultyMeasurement, Journal
from pocl.curriculum.measurement_cache import MeasurementCache
from pocl.curriculum.ranking import RankingKey, load_or_rank, rank, rank_by_column
from pocl.layout import PARTIAL_RANKING_FILE
from pocl.storage.shared_cache import SharedCache

# Few distinct values: most real answers of an untrained student tie at ROUGE-L 0.
measurement_lists = st.lists(
    st.tuples(st.sampled_from([0.0, 12.5, 50.0, 100.0]), st.sampled_from([0.5, 2.0, 3.25])), min_size=1, max_size=40
).map(
    lambda pairs: [
        DifficultyMeasurement(row=i, digest=f"{i:064x}", rouge_l=rouge, cross_entropy=ce, response="")
        for i, (rouge, ce) in enumerate(pairs)
    ]
)
INPUTS = RankingKey(
    generator="engine",
    model="s", data="d", template="chat", end_ids=(2,), rrf_k=60, max_new_tokens=8, batch_size=16,
    scoring_tokens=64, chunk_tokens=8, precision="fp32", machine="cpu",
)  # fmt: skip
DIGESTS = ("sample a",)
SAMPLE = DifficultyMeasurement(row=0, digest="a", rouge_l=1, cross_entropy=1, response="é\u2028")


def cache_in(tmp_path: Path) -> SharedCache:
    return SharedCache(tmp_path / "cache", 1 << 20)


def measure_once(_journal: Journal) -> list[DifficultyMeasurement]:
    return [SAMPLE]


def must_not_measure(_journal: Journal) -> list[DifficultyMeasurement]:
    pytest.fail("measured twice")


def test_rank_fusion_equals_the_formula_of_the_paper() -> None:
    easy = DifficultyMeasurement(row=0, digest="a", rouge_l=90, cross_entropy=1.0, response="")
    middle = DifficultyMeasurement(row=1, digest="b", rouge_l=10, cross_entropy=0.5, response="")
    hard = DifficultyMeasurement(row=2, digest="c", rouge_l=0, cross_entropy=9.0, response="")
    ranked = rank([hard, middle, easy], k=60)
    assert [sample.digest for sample in ranked] == ["b", "a", "c"] or [s.digest for s in ranked] == ["a", "b", "c"]
    assert {sample.digest: sample.score for sample in ranked} == pytest.approx(
        {"a": 1 / 61 + 1 / 62, "b": 1 / 62 + 1 / 61, "c": 1 / 63 + 1 / 63}
    )


@given(measurement_lists)
def test_ranks_are_a_permutation_of_all_samples(measurements: list[DifficultyMeasurement]) -> None:
    ranked = rank(measurements)
    assert [sample.rank for sample in ranked] == list(range(1, len(measurements) + 1))
    assert sorted(sample.row for sample in ranked) == list(range(len(measurements)))


@given(measurement_lists, st.randoms(use_true_random=False))
def test_ranking_does_not_depend_on_file_order(measurements: list[DifficultyMeasurement], random: object) -> None:
    shuffled = list(measurements)
    random.shuffle(shuffled)  # type: ignore[attr-defined] # hypothesis types its random as object.
    assert [sample.digest for sample in rank(shuffled)] == [sample.digest for sample in rank(measurements)]


@given(measurement_lists)
def test_sample_easier_by_both_measures_comes_first(measurements: list[DifficultyMeasurement]) -> None:
    ranked = rank(measurements)
    measured = {each.row: each for each in measurements}
    for earlier, later in pairwise(ranked):
        first, second = measured[earlier.row], measured[later.row]
        assert not (second.rouge_l > first.rouge_l and second.cross_entropy < first.cross_entropy)
        assert earlier.score >= later.score


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_column_ranks_by_its_values_and_not_by_the_order_of_the_file(values: list[int], random: object) -> None:
    rows = [(float(value), f"{index}") for index, value in enumerate(values)]
    moved = list(rows)
    random.shuffle(moved)  # type: ignore[attr-defined] # hypothesis types its random as object.
    difficulties, digests = [value for value, _ in moved], [digest for _, digest in moved]
    lowest = [sample.digest for sample in rank_by_column(difficulties, digests, easiest="lowest")]
    highest = [sample.digest for sample in rank_by_column(difficulties, digests, easiest="highest")]
    assert lowest == [digest for _, digest in sorted(rows)]
    assert highest == [digest for _, digest in sorted(rows, key=lambda row: (-row[0], row[1]))]


def test_ranking_of_equal_inputs_is_loaded(tmp_path: Path) -> None:
    first, was_loaded = load_or_rank(tmp_path, INPUTS, DIGESTS, measure_once, cache_in(tmp_path))
    again, was_loaded_again = load_or_rank(tmp_path, INPUTS, DIGESTS, must_not_measure, cache_in(tmp_path))
    assert (first, was_loaded, was_loaded_again) == (again, False, True)


CHANGES: list[dict[str, object]] = [
    {"model": "t"}, {"sampling": "temperature 0.01, seed 10"}, {"no_repeat_ngram": 6},
    {"data": "e"}, {"rrf_k": 1}, {"precision": "bf16"}, {"batching": 99},
    {"end_ids": (1, 2)}, {"template": "plain"}, {"max_new_tokens": 9},
]  # fmt: skip
ROUNDING: list[dict[str, object]] = [
    {"machine": "cuda"}, {"batch_size": 8}, {"scoring_tokens": 32}, {"chunk_tokens": 4},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_inputs_are_measured_anew_unless_the_fusion_alone_has_changed(
    tmp_path: Path, change: dict[str, object]
) -> None:
    shared = cache_in(tmp_path)
    load_or_rank(tmp_path, INPUTS, DIGESTS, measure_once, shared)
    changed = INPUTS.model_copy(update=change)
    reused: list[int] = []

    def measure(journal: Journal) -> list[DifficultyMeasurement]:
        reused.extend(journal.reused or {})
        return [replace(SAMPLE, digest="z")]

    other, was_loaded = load_or_rank(tmp_path, changed, DIGESTS, measure, shared)
    assert (other[0].digest, was_loaded) == ("z", False)
    # Data are kept by sample, and the constant of the fusion enters no measurement.
    assert reused == ([0] if change.keys() <= {"rrf_k", "data"} else [])


def test_every_input_changes_the_cache_key() -> None:
    changes: list[dict[str, object]] = [{}, *ROUNDING, *CHANGES]
    keys = {INPUTS.model_copy(update=change).digest for change in changes}
    assert len(keys) == len(changes)


def test_damaged_ranking_is_measured_anew(tmp_path: Path) -> None:
    load_or_rank(tmp_path, INPUTS, DIGESTS, measure_once, cache_in(tmp_path))
    (tmp_path / "ranking.jsonl").write_text("{}\n")
    assert load_or_rank(tmp_path, INPUTS, DIGESTS, measure_once, cache_in(tmp_path))[1] is False


@pytest.mark.parametrize("change", ROUNDING)
def test_run_continued_on_another_machine_or_with_other_sizes_keeps_its_ranking(
    tmp_path: Path, change: dict[str, object]
) -> None:
    ranking, _ = load_or_rank(tmp_path, INPUTS, DIGESTS, measure_once, cache_in(tmp_path))
    moved = INPUTS.model_copy(update=change)
    assert load_or_rank(tmp_path, moved, DIGESTS, must_not_measure, cache_in(tmp_path)) == (ranking, True)


def test_journal_exists_until_the_ranking_is_complete(tmp_path: Path) -> None:
    def interrupted(journal: Journal) -> list[DifficultyMeasurement]:
        journal.append([SAMPLE])
        raise KeyboardInterrupt

    def continued(journal: Journal) -> list[DifficultyMeasurement]:
        measurements = journal.get([0])
        assert measurements is not None
        return measurements

    with pytest.raises(KeyboardInterrupt):
        load_or_rank(tmp_path, INPUTS, DIGESTS, interrupted, cache_in(tmp_path))
    ranking, _ = load_or_rank(tmp_path, INPUTS, DIGESTS, continued, cache_in(tmp_path))
    assert ranking == rank([SAMPLE])
    assert not (tmp_path / PARTIAL_RANKING_FILE).exists()


def test_journal_of_a_complete_ranking_is_removed(tmp_path: Path) -> None:
    load_or_rank(tmp_path, INPUTS, DIGESTS, measure_once, cache_in(tmp_path))
    (tmp_path / PARTIAL_RANKING_FILE).write_text("left by a kill")
    load_or_rank(tmp_path, INPUTS, DIGESTS, must_not_measure, cache_in(tmp_path))
    assert not (tmp_path / PARTIAL_RANKING_FILE).exists()


def directory(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def measured(row: int) -> DifficultyMeasurement:
    return DifficultyMeasurement(row=row, digest=f"{row}", rouge_l=row, cross_entropy=1 / (1 + row), response="é")


def names(*rows: int) -> list[str]:
    return [f"sample {row}" for row in rows]


def test_measurements_are_found_by_sample_in_whichever_entry_has_them(tmp_path: Path) -> None:
    found = MeasurementCache(cache_in(tmp_path), INPUTS.measurement_key)
    assert found.find(names(0, 1)) == []
    found.add([measured(0), measured(1)], names(0, 1))
    found.add([measured(2)], names(0, 1, 2))
    assert found.find(names(2, 7, 1)) == [replace(measured(2), row=0), replace(measured(1), row=2)]
    for change in ROUNDING:
        elsewhere = INPUTS.model_copy(update=change).measurement_key
        assert MeasurementCache(cache_in(tmp_path), elsewhere).find(names(0)) == []


@pytest.mark.parametrize("name", ["measurements.jsonl", "manifest.json"])
def test_damaged_measurements_are_made_anew(tmp_path: Path, name: str) -> None:
    found = MeasurementCache(cache_in(tmp_path), INPUTS.measurement_key)
    found.add([measured(0)], names(0))
    (victim,) = (tmp_path / "cache" / found.kind).glob(f"*/{name}")
    victim.write_text("damaged")
    assert found.find(names(0)) == []
    found.add([measured(0)], names(0))
    assert found.find(names(0)) == [measured(0)]


def ranked_with(directory: Path, shared: SharedCache, *rows: int, rrf_k: int = 60) -> tuple[list[str], list[int]]:
    """Order of the samples `rows`, easiest first, and which of them had to be measured."""
    directory.mkdir(exist_ok=True)
    had_to: list[int] = []

    def measure(journal: Journal) -> list[DifficultyMeasurement]:
        reused = journal.reused or {}
        had_to.extend(row for place, row in enumerate(rows) if place not in reused)
        new = [replace(measured(row), row=place) for place, row in enumerate(rows) if place not in reused]
        return [*reused.values(), *new]

    key = INPUTS.model_copy(update={"data": f"{rows}", "rrf_k": rrf_k})
    ranking, _ = load_or_rank(directory, key, names(*rows), measure, shared)
    return [sample.digest for sample in ranking], had_to


def test_another_fusion_a_subset_or_one_more_sample_measures_what_is_missing(tmp_path: Path) -> None:
    shared = cache_in(tmp_path)
    first, measured_first = ranked_with(tmp_path / "1", shared, 0, 1, 2, 3)
    assert measured_first == [0, 1, 2, 3]
    assert ranked_with(tmp_path / "2", shared, 0, 1, 2, 3, rrf_k=5) == (first, [])
    assert ranked_with(tmp_path / "3", shared, 3, 1)[1] == []
    more, measured_more = ranked_with(tmp_path / "4", shared, 4, 0, 1, 2, 3)
    assert measured_more == [4]
    assert more == ranked_with(tmp_path / "5", cache_in(tmp_path / "empty"), 4, 0, 1, 2, 3)[0]


def test_killed_ranking_takes_from_the_cache_what_it_took_at_first(tmp_path: Path) -> None:
    shared = cache_in(tmp_path)
    MeasurementCache(shared, INPUTS.measurement_key).add([SAMPLE], DIGESTS)

    def interrupted(journal: Journal) -> list[DifficultyMeasurement]:
        assert journal.reused == {0: SAMPLE}
        raise KeyboardInterrupt

    def continued(journal: Journal) -> list[DifficultyMeasurement]:
        assert journal.reused == {0: SAMPLE}
        return [SAMPLE]

    with pytest.raises(KeyboardInterrupt):
        load_or_rank(tmp_path, INPUTS, DIGESTS, interrupted, shared)
    # Neither what was evicted meanwhile nor what was added changes the batches of the rest.
    load_or_rank(tmp_path, INPUTS, DIGESTS, continued, cache_in(tmp_path / "other"))
    late = cache_in(tmp_path / "late")
    fresh = directory(tmp_path, "fresh")
    with pytest.raises(KeyboardInterrupt):
        load_or_rank(fresh, INPUTS, DIGESTS, lambda journal: stop_unless(journal.reused == {}), late)
    MeasurementCache(late, INPUTS.measurement_key).add([SAMPLE], DIGESTS)
    with pytest.raises(KeyboardInterrupt):
        load_or_rank(fresh, INPUTS, DIGESTS, lambda journal: stop_unless(journal.reused == {}), late)


def stop_unless(holds: bool) -> list[DifficultyMeasurement]:
    assert holds
    raise KeyboardInterrupt


def test_unusable_cache_does_not_prevent_a_ranking(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert load_or_rank(tmp_path, INPUTS, DIGESTS, measure_once, SharedCache(tmp_path / "file", 1 << 20))[0] == rank(
        [SAMPLE]
    )
    assert load_or_rank(tmp_path, INPUTS, DIGESTS, must_not_measure, cache_in(tmp_path))[1] is True
