"""Presets of defaults, and how a client's fields are resolved to a whole specification."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pocl.errors import FieldError, SpecInvalid
from pocl.spec.curriculum import CONTROL_KINDS, RANKER_KINDS, ConstantTemperature, ConstantWeight, NoCurriculum
from pocl.spec.distillation import DistillationSpec
from pocl.spec.methods import METHODS, KDMethod

PRESETS: dict[str, dict[str, Any]] = {
    # The defaults of the classes above are the paper's.
    "paper": {},
    "pocl_official": {"curriculum": {"ranking": {"temperature": 0.01, "no_repeat_ngram": 6}}},
    "quick": {
        "data": {"max_length": 256, "max_prompt_length": 192},
        "curriculum": {"epochs_per_stage": 1, "ranking": {"max_new_tokens": 32}},
        "training": {"batch_size": 8, "learning_rate": 3e-4, "min_learning_rate": 3e-5},
        "evaluation": {"max_new_tokens": 32, "max_rows": 64},
        "checkpoints": {"every_steps": 50},
    },
}


def resolve(raw: Mapping[str, Any]) -> DistillationSpec:
    """Lay `raw` over its preset and return the specification with every default filled in.

    Raises:
        SpecInvalid: with a pointer and a sentence for every field that is wrong.
    """
    merged = _merge_preset(raw)
    try:
        spec = DistillationSpec.model_validate(merged)
    except ValidationError as error:
        raise SpecInvalid(field_errors(error)) from None
    return _resolve_control(spec)


def field_errors(error: ValidationError) -> list[FieldError]:
    """Pydantic's errors with pointers into what the caller wrote, and never the value itself."""
    return [
        FieldError(pointer=_pointer(details["loc"]), code=details["type"], detail=_sentence(details))
        for details in error.errors(include_input=False, include_url=False)
    ]


def _merge_preset(raw: Mapping[str, Any]) -> dict[str, Any]:
    preset = raw.get("preset", "paper")
    method = raw.get("method", KDMethod.FORWARD_KL.value)
    method = {"name": method} if isinstance(method, str) else method
    if preset == "pocl_official" and isinstance(method, Mapping) and isinstance(method.get("name"), str):
        published = {name: type_.published for name, type_ in METHODS.items()}
        method = {**published.get(method["name"], {}), **method}
    # An unknown preset is left for the validation to name.
    defaults = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    return _merge(defaults, {**raw, "method": method})


def _merge(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**defaults, **overrides}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(overrides.get(key), Mapping):
            merged[key] = _merge(default, overrides[key])
    return merged


def _resolve_control(spec: DistillationSpec) -> DistillationSpec:
    """Fill in the defaults of a control experiment, which follow from the curriculum."""
    curriculum, control = spec.curriculum, spec.curriculum.control
    defaults: dict[str, float] = {}
    if isinstance(control, NoCurriculum | ConstantTemperature) and control.temperature is None:
        defaults["temperature"] = curriculum.temperature.start
    if isinstance(control, NoCurriculum | ConstantWeight) and control.kd_weight is None:
        defaults["kd_weight"] = curriculum.kd_weight.mean_over_visits(curriculum.stages)
    if not defaults or control is None:
        return spec
    control = control.model_copy(update=defaults)
    return spec.model_copy(update={"curriculum": curriculum.model_copy(update={"control": control})})


def _sentence(details: ErrorDetails) -> str:
    if details["type"] == "union_tag_invalid":
        # This is the one sentence of pydantic that quotes the value and spells enum members as Python does.
        return "must be one of " + re.sub(r"<[\w.]+: ('\w+')>", r"\1", details["ctx"]["expected_tags"])
    return details["msg"].removeprefix("Value error, ")


_TAGS = {*KDMethod, "epochs", "convergence", *CONTROL_KINDS, *RANKER_KINDS}


def _pointer(location: tuple[int | str, ...]) -> str:
    # A tagged union puts its tag into the location; the caller wrote no such key.
    parts = [
        str(part)
        for parent, part in zip(("", *location), location, strict=False)
        if not (part in _TAGS and parent in ("method", "advance", "control", "ranker"))
    ]
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)
