"""Presets of defaults, and how a client's fields are resolved to a whole specification."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from pocl.errors import SpecInvalid
from pocl.spec.curriculum import ConstantTemperature, ConstantWeight, NoCurriculum
from pocl.spec.distillation import DistillationSpec, PresetName
from pocl.spec.methods import METHODS, KDMethod
from pocl.spec.validation_errors import field_errors

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
PRESET_DESCRIPTIONS: Final[Mapping[PresetName, str]] = {
    "paper": "The paper's experiments: 4 stages of 8 epochs each.",
    "pocl_official": "As `paper`, with the loss scaling of the published code, and answers for the ranking as it makes "
    "them.",
    "quick": "Small and short: a first result in minutes, on a CPU too.",
}


@dataclass(frozen=True)
class PresetDefaults:
    """What a preset fills in where a client leaves a field out."""

    description: str
    spec: Mapping[str, Any]
    """The specification, without models and data sets, which have no default."""
    methods: Mapping[str, Mapping[str, Any]]
    """The default parameters of each method by its name."""


def resolve(raw: Mapping[str, Any]) -> DistillationSpec:
    """Lay `raw` over its preset and return the specification with every default filled in.

    Raises:
        SpecInvalid: with a pointer and a sentence for every field that is wrong.
    """
    merged = _merge_preset(raw)
    try:
        spec = DistillationSpec.model_validate(merged)
    except ValidationError as error:
        raise SpecInvalid(field_errors(error, DistillationSpec)) from None
    return _resolve_control(spec)


def describe_preset(name: PresetName) -> PresetDefaults:
    """The defaults of a preset, resolved."""

    def resolved(method: str) -> dict[str, Any]:
        # A model and a data set have no default: these stand in for them.
        needed = {"student": {"random": {}}, "teacher": {"random": {}}, "data": {"train": {"path": "-"}}}
        return resolve({"preset": name, "method": method, **needed}).model_dump(mode="json")

    methods = {str(method): resolved(method)["method"] for method in KDMethod}
    spec = resolved(KDMethod.FORWARD_KL)
    del spec["student"], spec["teacher"], spec["data"]["train"]
    return PresetDefaults(PRESET_DESCRIPTIONS[name], spec, methods)


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
