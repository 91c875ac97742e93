"""Defaults under a client's fields, and the way from those fields to a whole specification."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pocl.errors import FieldError, SpecInvalid
from pocl.spec.curriculum import ConstantTemperature, NoCurriculum
from pocl.spec.distillation import DistillationSpec
from pocl.spec.methods import METHODS, KDMethod

PRESETS: dict[str, dict[str, Any]] = {
    # The defaults of the classes above are the paper's.
    "paper": {},
    "pocl_official": {},
    "quick": {
        "data": {"max_length": 256, "max_prompt_length": 192},
        "curriculum": {"epochs_per_stage": 1, "ranking": {"max_new_tokens": 32}},
        "training": {"batch_size": 8, "learning_rate": 3e-4, "min_learning_rate": 3e-5},
        "evaluation": {"max_new_tokens": 32, "max_rows": 64},
        "checkpoints": {"every_steps": 50},
    },
}


def resolve(raw: Mapping[str, Any]) -> DistillationSpec:
    """Lay `raw` over its preset and return the specification with every default named.

    Raises:
        SpecInvalid: with a pointer and a sentence for every field that is wrong.
    """
    layered = _over_preset(raw)
    try:
        spec = DistillationSpec.model_validate(layered)
    except ValidationError as error:
        raise SpecInvalid(field_errors(error)) from None
    return _name_control_values(spec)


def field_errors(error: ValidationError) -> list[FieldError]:
    """Pydantic's findings as problems: pointers into what the caller wrote, and never the value itself."""
    return [
        FieldError(pointer=_pointer(found["loc"]), code=found["type"], detail=_sentence(found))
        for found in error.errors(include_input=False, include_url=False)
    ]


def _over_preset(raw: Mapping[str, Any]) -> dict[str, Any]:
    preset = raw.get("preset", "paper")
    method = raw.get("method", KDMethod.FORWARD_KL.value)
    method = {"name": method} if isinstance(method, str) else method
    if preset == "pocl_official" and isinstance(method, Mapping) and isinstance(method.get("name"), str):
        published = {name: type_.published for name, type_ in METHODS.items()}
        method = {**published.get(method["name"], {}), **method}
    # An unknown preset is left for the validation to name.
    under = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    return _merge(under, {**raw, "method": method})


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**under, **over}
    for key, value in under.items():
        if isinstance(value, Mapping) and isinstance(over.get(key), Mapping):
            merged[key] = _merge(value, over[key])
    return merged


def _name_control_values(spec: DistillationSpec) -> DistillationSpec:
    curriculum, control = spec.curriculum, spec.curriculum.control
    named: dict[str, float] = {}
    if isinstance(control, NoCurriculum | ConstantTemperature) and control.temperature is None:
        named["temperature"] = curriculum.temperature.start
    if isinstance(control, NoCurriculum) and control.kd_weight is None:
        named["kd_weight"] = (curriculum.kd_weight.start + curriculum.kd_weight.end) / 2
    if not named or control is None:
        return spec
    control = control.model_copy(update=named)
    return spec.model_copy(update={"curriculum": curriculum.model_copy(update={"control": control})})


def _sentence(found: ErrorDetails) -> str:
    if found["type"] == "union_tag_invalid":
        # The one sentence of pydantic that quotes the value, and that shows enum members as Python does.
        return "must be one of " + re.sub(r"<[\w.]+: ('\w+')>", r"\1", found["ctx"]["expected_tags"])
    return found["msg"].removeprefix("Value error, ")


_TAGS = {*KDMethod, "epochs", "convergence", "no_curriculum", "shuffled_stages", "constant_temperature"}


def _pointer(location: tuple[int | str, ...]) -> str:
    # A tagged union puts its tag into the location; the caller wrote no such key.
    kept = [
        str(part)
        for before, part in zip(("", *location), location, strict=False)
        if not (part in _TAGS and before in ("method", "advance", "control"))
    ]
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in kept)
