"""Splits by the content of samples: whole, disjoint, independent of order, stable, of about the share asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.samples.sample import Message, Sample
from pocl.samples.splits import Splits, split_samples
from pocl.spec import Data, DataRef, DataSplit

MANY = [Sample((Message("user", f"question {i}"), Message("assistant", "yes"))) for i in range(4000)]


def contents(splits: Splits) -> list[set[str]]:
    return [{sample.digest for sample in part} for part in (splits.train, splits.validation, splits.test)]


@given(
    st.lists(st.sampled_from(MANY[:50]), max_size=40).flatmap(
        lambda rows: st.tuples(st.just(rows), st.permutations(rows))
    ),
    st.sampled_from(MANY[50:60]),
    st.integers(0, 5),
)
def test_split_depends_on_nothing_but_content_and_seed(
    orders: tuple[list[Sample], list[Sample]], added: Sample, seed: int
) -> None:
    one, other = (split_samples(rows, validation=0.3, test=0.2, seed=seed) for rows in orders)
    assert len(one.train) + len(one.validation) + len(one.test) == len(orders[0])
    train, validation, test = contents(one)
    assert len(train | validation | test) == len(train) + len(validation) + len(test)
    assert contents(other) == [train, validation, test]
    more = contents(split_samples([added, *orders[0]], validation=0.3, test=0.2, seed=seed))
    assert all(before <= after for before, after in zip([train, validation, test], more, strict=True))


def test_shares_are_about_what_was_asked_for_and_seeds_differ() -> None:
    splits = split_samples(MANY, validation=0.1, test=0.25, seed=0)
    assert abs(len(splits.validation) / len(MANY) - 0.1) < 0.02
    assert abs(len(splits.test) / len(MANY) - 0.25) < 0.03
    assert contents(splits) != contents(split_samples(MANY, validation=0.1, test=0.25, seed=1))


def test_held_out_samples_are_given_in_one_way() -> None:
    train = DataRef(path="rows.jsonl")
    assert Data(train=train, split=DataSplit(validation=0.1)).has_validation
    assert not Data(train=train, split=DataSplit(test=0.1)).has_validation
    assert Data(train=train, test=train, split=DataSplit(validation=0.1)).test == train
    with pytest.raises(ValueError, match=r"split\.validation"):
        Data(train=train, validation=train, split=DataSplit(validation=0.1))
    for validation, test in ((0.0, 0.0), (0.6, 0.4)):
        with pytest.raises(ValueError, match="together"):
            DataSplit(validation=validation, test=test)
