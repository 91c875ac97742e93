"""Identifiers."""

import re
from typing import get_args

import pytest

from domain.ids import Prefix, new_id
from pocl.spec import DataRef, ModelRef


@pytest.mark.parametrize("prefix", get_args(Prefix))
def test_an_id_has_its_prefix_and_26_characters(prefix: Prefix) -> None:
    assert re.fullmatch(rf"{prefix}_[0-9a-z]{{26}}", new_id(prefix))


def test_a_specification_takes_the_ids() -> None:
    assert DataRef(dataset=new_id("ds")).dataset
    assert ModelRef(checkpoint=new_id("ckpt")).checkpoint


def test_ids_sort_by_creation_time() -> None:
    ids = [new_id("job") for _ in range(1000)]
    assert sorted(ids) == ids
    assert len(set(ids)) == 1000
