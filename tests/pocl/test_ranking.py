"""The ranking: total, stable, blind to file order, and reused only for equal inputs."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.curriculum.journal import DifficultyMeasurement, Journal
from pocl.curriculum.ranking import CACHE_KIND, RankingCacheKey, load_or_rank, rank
from pocl.layout import PARTIAL_RANKING_FILE, RANKING_FILE, RANKING_INPUTS_FILE
from pocl.storage.shared_cache import SharedCache

# Few distinct values: most real answers of an untrained student tie at ROUGE-L 0.
measured_lists = st.lists(
    st.tuples(st.sampled_from([0.0, 12.5, 50.0, 100.0]), st.sampled_from([0.5, 2.0, 3.25])), min_size=1, max_size=40
).map(
    lambda pairs: [
        DifficultyMeasurement(row=i, digest=f"{i:064x}", rouge_l=rouge, cross_entropy=ce, response="")
        for i, (rouge, ce) in enumerate(pairs)
    ]
)
INPUTS = RankingCacheKey(
    student="s", data="d", template="chat", end_ids=(2,), rrf_k=60, max_new_tokens=8, batch_size=16,
    precision="fp32", machine="cpu",
)  # fmt: skip
SAMPLE = DifficultyMeasurement(row=0, digest="a", rouge_l=1, cross_entropy=1, response="é\u2028")


def store_in(tmp_path: Path) -> SharedCache:
    return SharedCache(tmp_path / "cache", 1 << 20)


def measured_once(_journal: Journal) -> list[DifficultyMeasurement]:
    return [SAMPLE]


def never(_journal: Journal) -> list[DifficultyMeasurement]:
    pytest.fail("measured twice")


def test_the_fusion_is_the_papers_formula() -> None:
    easy = DifficultyMeasurement(row=0, digest="a", rouge_l=90, cross_entropy=1.0, response="")
    middle = DifficultyMeasurement(row=1, digest="b", rouge_l=10, cross_entropy=0.5, response="")
    hard = DifficultyMeasurement(row=2, digest="c", rouge_l=0, cross_entropy=9.0, response="")
    ranked = rank([hard, middle, easy], k=60)
    assert [sample.digest for sample in ranked] == ["b", "a", "c"] or [s.digest for s in ranked] == ["a", "b", "c"]
    assert {sample.digest: sample.score for sample in ranked} == pytest.approx(
        {"a": 1 / 61 + 1 / 62, "b": 1 / 62 + 1 / 61, "c": 1 / 63 + 1 / 63}
    )


@given(measured_lists)
def test_every_sample_has_one_place(measured: list[DifficultyMeasurement]) -> None:
    ranked = rank(measured)
    assert [sample.rank for sample in ranked] == list(range(1, len(measured) + 1))
    assert sorted(sample.row for sample in ranked) == list(range(len(measured)))


@given(measured_lists, st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_the_file(measured: list[DifficultyMeasurement], random: object) -> None:
    shuffled = list(measured)
    random.shuffle(shuffled)  # type: ignore[attr-defined] # hypothesis types its random as object.
    assert [sample.digest for sample in rank(shuffled)] == [sample.digest for sample in rank(measured)]


@given(measured_lists)
def test_what_is_easier_by_both_measures_comes_first(measured: list[DifficultyMeasurement]) -> None:
    ranked = rank(measured)
    for earlier, later in pairwise(ranked):
        assert not (later.rouge_l > earlier.rouge_l and later.cross_entropy < earlier.cross_entropy)
        assert earlier.score >= later.score


def test_a_ranking_of_equal_inputs_is_taken_over(tmp_path: Path) -> None:
    first, found = load_or_rank(tmp_path, INPUTS, measured_once, store_in(tmp_path))
    again, found_again = load_or_rank(tmp_path, INPUTS, never, store_in(tmp_path))
    assert (first, found, found_again) == (again, False, True)


CHANGES: list[dict[str, object]] = [
    {"student": "t"}, {"data": "e"}, {"rrf_k": 1}, {"precision": "bf16"}, {"batch_size": 8}, {"batching": 99},
    {"end_ids": (1, 2)}, {"template": "plain"}, {"max_new_tokens": 9},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_inputs_are_measured_anew(tmp_path: Path, change: dict[str, object]) -> None:
    shared = store_in(tmp_path)
    load_or_rank(tmp_path, INPUTS, measured_once, shared)
    changed = INPUTS.model_copy(update=change)
    other, found = load_or_rank(tmp_path, changed, lambda _: [replace(SAMPLE, digest="z")], shared)
    assert (other[0].digest, found) == ("z", False)


def test_every_input_has_a_say_in_the_key() -> None:
    changes: list[dict[str, object]] = [{}, {"machine": "cuda"}, *CHANGES]
    keys = {INPUTS.model_copy(update=change).digest for change in changes}
    assert len(keys) == len(CHANGES) + 2


def test_a_damaged_ranking_is_measured_anew(tmp_path: Path) -> None:
    load_or_rank(tmp_path, INPUTS, measured_once, store_in(tmp_path))
    (tmp_path / "ranking.jsonl").write_text("{}\n")
    assert load_or_rank(tmp_path, INPUTS, measured_once, store_in(tmp_path))[1] is False


def test_a_run_that_moves_to_another_machine_keeps_its_order(tmp_path: Path) -> None:
    ranking, _ = load_or_rank(tmp_path, INPUTS, measured_once, store_in(tmp_path))
    moved = INPUTS.model_copy(update={"machine": "cuda"})
    assert load_or_rank(tmp_path, moved, never, store_in(tmp_path)) == (ranking, True)


def test_the_journal_is_there_until_the_ranking_is_whole(tmp_path: Path) -> None:
    def broken_off(journal: Journal) -> list[DifficultyMeasurement]:
        journal.append([SAMPLE])
        raise KeyboardInterrupt

    def carried_on(journal: Journal) -> list[DifficultyMeasurement]:
        found = journal.get([0])
        assert found is not None
        return found

    with pytest.raises(KeyboardInterrupt):
        load_or_rank(tmp_path, INPUTS, broken_off, store_in(tmp_path))
    ranking, _ = load_or_rank(tmp_path, INPUTS, carried_on, store_in(tmp_path))
    assert ranking == rank([SAMPLE])
    assert not (tmp_path / PARTIAL_RANKING_FILE).exists()


def test_a_journal_of_a_whole_ranking_is_removed(tmp_path: Path) -> None:
    load_or_rank(tmp_path, INPUTS, measured_once, store_in(tmp_path))
    (tmp_path / PARTIAL_RANKING_FILE).write_text("left by a kill")
    load_or_rank(tmp_path, INPUTS, never, store_in(tmp_path))
    assert not (tmp_path / PARTIAL_RANKING_FILE).exists()


def directory(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_a_shared_ranking_is_copied_bit_for_bit(tmp_path: Path) -> None:
    shared, first, second = store_in(tmp_path), directory(tmp_path, "1"), directory(tmp_path, "2")
    ranking, _ = load_or_rank(first, INPUTS, measured_once, shared)
    assert load_or_rank(second, INPUTS, never, shared) == (ranking, False)
    for name in (RANKING_FILE, RANKING_INPUTS_FILE):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_ranking_of_another_machine_is_not_shared(tmp_path: Path) -> None:
    shared = store_in(tmp_path)
    load_or_rank(directory(tmp_path, "1"), INPUTS, measured_once, shared)
    moved = INPUTS.model_copy(update={"machine": "cuda"})
    other, _ = load_or_rank(directory(tmp_path, "2"), moved, lambda _: [replace(SAMPLE, digest="z")], shared)
    assert other[0].digest == "z"


@pytest.mark.parametrize("name", [RANKING_FILE, RANKING_INPUTS_FILE, "manifest.json"])
def test_a_damaged_shared_ranking_is_made_again(tmp_path: Path, name: str) -> None:
    shared = store_in(tmp_path)
    load_or_rank(directory(tmp_path, "1"), INPUTS, measured_once, shared)
    (shared.root / CACHE_KIND / INPUTS.digest / name).write_text("damaged")
    ranking, found = load_or_rank(directory(tmp_path, "2"), INPUTS, measured_once, shared)
    assert (ranking, found) == (rank([SAMPLE]), False)
    assert load_or_rank(directory(tmp_path, "3"), INPUTS, never, shared)[0] == ranking


def test_a_place_that_cannot_be_shared_does_not_stop_the_ranking(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert load_or_rank(tmp_path, INPUTS, measured_once, SharedCache(tmp_path / "file", 1 << 20))[0] == rank([SAMPLE])
    assert load_or_rank(tmp_path, INPUTS, never, store_in(tmp_path))[1] is True
