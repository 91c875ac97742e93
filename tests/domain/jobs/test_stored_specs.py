"""A stored specification says the same as the submitted one, in words that the generation before knows."""

from typing import Any

import pytest

from domain.jobs.stored_specs import ADDED_IN_THIS_GENERATION, stored_spec
from pocl.spec import DistillationSpec
from tests.support.requests import specification

OTHER_VALUES: dict[tuple[str, str], Any] = {
    ("export", "gguf"): ["q8_0"],
    ("export", "hub"): {"repo": "acme/student", "private": False, "branch": "v1", "checkpoint": "final"},
}
"""Of each field that came within this generation, one that is not its default."""


def spec_with(part: str, **fields: Any) -> DistillationSpec:
    return DistillationSpec.model_validate(specification("ds_00000001", **{part: fields}))


@pytest.mark.parametrize(("part", "name"), ADDED_IN_THIS_GENERATION)
def test_new_fields_are_left_out_at_their_defaults_and_kept_elsewhere(part: str, name: str) -> None:
    plain = spec_with(part)
    assert name not in stored_spec(plain)[part]
    assert DistillationSpec.model_validate(stored_spec(plain)) == plain
    other = spec_with(part, **{name: OTHER_VALUES[part, name]})
    assert stored_spec(other)[part][name] == OTHER_VALUES[part, name]
    assert DistillationSpec.model_validate(stored_spec(other)) == other
