"""The engine's errors as errors of the service."""

import pytest

from domain.errors import EngineRefusal, engine_refusals
from pocl.errors import DiskFull, FieldError, ModelNotFound, SpecInvalid

STAGES = FieldError("/curriculum/stages", "stages_exceed_samples", "too many")


def test_a_refusal_carries_the_engines_code_and_fields_below_the_pointer() -> None:
    with pytest.raises(EngineRefusal) as refused, engine_refusals("/spec"):
        raise SpecInvalid([STAGES])
    assert (refused.value.status, refused.value.code) == (422, "spec_invalid")
    assert refused.value.detail == "The specification is not valid: correct the named fields and submit again."
    assert refused.value.field_errors == (FieldError("/spec/curriculum/stages", STAGES.code, STAGES.detail),)


def test_an_engines_error_without_fields_is_about_the_field_at_the_pointer() -> None:
    error = ModelNotFound("There is no model.")
    assert EngineRefusal(error, pointer="/teacher/path").field_errors == (
        FieldError("/teacher/path", "model_not_found", "There is no model."),
    )
    assert EngineRefusal(error).field_errors == ()


def test_an_error_that_is_not_the_callers_fault_is_no_refusal() -> None:
    with pytest.raises(DiskFull), engine_refusals():
        raise DiskFull
