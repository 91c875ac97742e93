"""The ranking: total, stable, blind to file order, and reused only for equal inputs."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.curriculum.difficulty import Measured, RankingInputs, load_or_rank, rank
from pocl.reuse import ReuseStore

# Few distinct values: most real answers of an untrained student tie at ROUGE-L 0.
measured_lists = st.lists(
    st.tuples(st.sampled_from([0.0, 12.5, 50.0, 100.0]), st.sampled_from([0.5, 2.0, 3.25])), min_size=1, max_size=40
).map(
    lambda pairs: [
        Measured(row=i, digest=f"{i:064x}", rouge_l=rouge, cross_entropy=ce, response="")
        for i, (rouge, ce) in enumerate(pairs)
    ]
)
INPUTS = RankingInputs(
    student="s",
    data="d",
    template="chat",
    rrf_k=60,
    max_new_tokens=8,
    batch_size=4,
    precision="fp32",
    machine="m",
)
SAMPLE = Measured(row=0, digest="a", rouge_l=1, cross_entropy=1, response="\u00e9\u2028")


@pytest.fixture
def store(tmp_path: Path) -> ReuseStore:
    return ReuseStore(tmp_path / "cache", 1 << 20)


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    return new(tmp_path / "run")


def new(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_the_fusion_is_the_papers_formula() -> None:
    easy = Measured(row=0, digest="a", rouge_l=90, cross_entropy=1.0, response="")
    middle = Measured(row=1, digest="b", rouge_l=10, cross_entropy=0.5, response="")
    hard = Measured(row=2, digest="c", rouge_l=0, cross_entropy=9.0, response="")
    ranked = rank([hard, middle, easy], k=60)
    assert [sample.digest for sample in ranked] == ["b", "a", "c"] or [s.digest for s in ranked] == ["a", "b", "c"]
    assert {sample.digest: sample.score for sample in ranked} == pytest.approx(
        {"a": 1 / 61 + 1 / 62, "b": 1 / 62 + 1 / 61, "c": 1 / 63 + 1 / 63}
    )


@given(measured_lists)
def test_every_sample_has_one_place(measured: list[Measured]) -> None:
    ranked = rank(measured)
    assert [sample.rank for sample in ranked] == list(range(1, len(measured) + 1))
    assert sorted(sample.row for sample in ranked) == list(range(len(measured)))


@given(measured_lists, st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_the_file(measured: list[Measured], random: object) -> None:
    shuffled = list(measured)
    random.shuffle(shuffled)  # type: ignore[attr-defined] # hypothesis types its random as object.
    assert [sample.digest for sample in rank(shuffled)] == [sample.digest for sample in rank(measured)]


@given(measured_lists)
def test_what_is_easier_by_both_measures_comes_first(measured: list[Measured]) -> None:
    ranked = rank(measured)
    for earlier, later in pairwise(ranked):
        assert not (later.rouge_l > earlier.rouge_l and later.cross_entropy < earlier.cross_entropy)
        assert earlier.score >= later.score


def test_a_ranking_of_equal_inputs_is_taken_over(workdir: Path, store: ReuseStore) -> None:
    first, found = load_or_rank(workdir, INPUTS, lambda: [SAMPLE], store)
    again, found_again = load_or_rank(workdir, INPUTS, lambda: pytest.fail("measured twice"), store)
    assert (first, found, found_again) == (again, False, True)


def test_another_run_takes_it_over_too_and_has_it_in_its_own_directory(workdir: Path, store: ReuseStore) -> None:
    first, _ = load_or_rank(workdir, INPUTS, lambda: [SAMPLE], store)
    other = new(workdir.with_name("other"))
    again, _ = load_or_rank(other, INPUTS, lambda: pytest.fail("measured twice"), store)
    assert again == first
    for name in ("ranking.jsonl", "ranking.json"):
        assert (other / name).read_bytes() == (workdir / name).read_bytes()


@pytest.mark.parametrize(
    "change", [{"student": "t"}, {"data": "e"}, {"rrf_k": 1}, {"precision": "bf16"}, {"machine": "n"}]
)
def test_other_inputs_are_measured_anew(workdir: Path, store: ReuseStore, change: dict[str, object]) -> None:
    load_or_rank(workdir, INPUTS, lambda: [SAMPLE], store)
    changed = INPUTS.model_copy(update=change)
    other, found = load_or_rank(workdir, changed, lambda: [replace(SAMPLE, digest="z")], store)
    assert (other[0].digest, found) == ("z", False)


def test_what_is_damaged_everywhere_is_measured_anew(workdir: Path, store: ReuseStore) -> None:
    load_or_rank(workdir, INPUTS, lambda: [SAMPLE], store)
    for damaged in (workdir, store.root / "rankings" / INPUTS.key):
        (damaged / "ranking.jsonl").write_text("{}\n")
    again, found = load_or_rank(workdir, INPUTS, lambda: [replace(SAMPLE, digest="z")], store)
    assert (again[0].digest, found) == ("z", False)
