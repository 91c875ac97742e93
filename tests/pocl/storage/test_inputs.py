"""A run knows its inputs again, and names what differs."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.errors import InputsChanged, WorkdirMismatch
from pocl.layout import INPUTS_FILE
from pocl.storage.inputs import RunInput, RunInputs, order_free_digest, pin_inputs, pinned_inputs

digests = st.lists(st.text("0123456789abcdef", min_size=4, max_size=4), max_size=8)


@given(digests, st.randoms())
def test_order_of_digests_does_not_matter(values: list[str], random: Random) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)
    assert order_free_digest(shuffled) == order_free_digest(values)


@given(digests, digests)
def test_other_digests_or_other_repeats_have_another_digest(one: list[str], other: list[str]) -> None:
    assert (order_free_digest(one) == order_free_digest(other)) == (sorted(one) == sorted(other))


def test_difference_names_the_input_and_its_sizes() -> None:
    then = RunInputs(
        inputs={"train samples": RunInput(digest="a" * 64, size="16 rows"), "teacher": RunInput(digest="b")}
    )
    now = RunInputs(
        inputs={"train samples": RunInput(digest="c" * 64, size="40 rows"), "teacher": RunInput(digest="b")}
    )
    with pytest.raises(
        InputsChanged, match=r"these changed: the train samples \(16 rows then, 40 rows now\)\.$"
    ) as raised:
        then.refuse_changes(now)
    assert (raised.value.code, raised.value.fault, raised.value.retryable) == ("inputs_changed", "user", False)


def test_input_under_another_reference_may_be_another() -> None:
    then = RunInputs(inputs={"teacher": RunInput(digest="a", reference="one")})
    then.refuse_changes(RunInputs(inputs={"teacher": RunInput(digest="b", reference="other")}))
    with pytest.raises(InputsChanged):
        then.refuse_changes(RunInputs(inputs={"teacher": RunInput(digest="b", reference="one")}))


def test_digests_of_another_version_are_named_and_not_compared() -> None:
    then = RunInputs(inputs={"teacher": RunInput(digest="a", computed_by="transformers 1")})
    now = RunInputs(inputs={"teacher": RunInput(digest="b", computed_by="transformers 2")})
    then.refuse_changes(now)
    assert then.incomparable(now) == ["teacher"]


def test_pinned_inputs_come_back(tmp_path: Path) -> None:
    assert pinned_inputs(tmp_path) is None
    inputs = RunInputs(inputs={"teacher": RunInput(digest="a")}, commits={"owner/name@main": "c" * 40})
    pin_inputs(tmp_path, inputs)
    assert pinned_inputs(tmp_path) == inputs
    (tmp_path / INPUTS_FILE).write_text('{"inputs": 1}')
    with pytest.raises(WorkdirMismatch):
        pinned_inputs(tmp_path)
