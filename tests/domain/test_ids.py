"""Identifiers."""

import re
from typing import get_args

import pytest

from domain.ids import Prefix, new_id
from pocl.spec import DataRef, ModelRef


@pytest.mark.parametrize("prefix", get_args(Prefix))
def test_an_id_tells_its_kind_and_fits_the_specification(prefix: Prefix) -> None:
    assert re.fullmatch(rf"{prefix}_[0-9a-z]{{26}}", new_id(prefix))


def test_a_specification_takes_the_ids() -> None:
    assert DataRef(dataset=new_id("ds")).dataset
    assert ModelRef(checkpoint=new_id("ckpt")).checkpoint


def test_ids_sort_by_the_time_of_their_making() -> None:
    made = [new_id("job") for _ in range(1000)]
    assert sorted(made) == made
    assert len(set(made)) == 1000
