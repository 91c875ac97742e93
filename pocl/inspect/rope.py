"""Rotary position embeddings in config.json, in the spellings of old and new versions of transformers."""

from pydantic import JsonValue

from pocl.errors import ModelUnsupported
from pocl.inspect.config_values import number
from pocl.inspect.reading import JsonObject

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "axial": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
"""The kinds of rotary embeddings that transformers computes, and what each cannot do without."""
_RENAMED = {"su": "longrope"}
_LISTS = ("short_factor", "long_factor", "mrope_section")
_WHOLE_NUMBERS = ("original_max_position_embeddings",)


def normalised_rope(entries: JsonObject) -> JsonObject:
    """`entries` of a config whose rotary embeddings transformers can compute.

    Raises:
        ModelUnsupported: naming a kind that is not known, or what it lacks.
    """
    normalised = dict(entries)
    for name in ("rope_scaling", "rope_parameters"):
        if name not in entries:
            continue
        value = entries[name]
        if not value:
            del normalised[name]
            continue
        if not isinstance(value, dict):
            raise ModelUnsupported(
                f"The model's config.json has {name} that is no object; correct the entry in the file."
            )
        normalised[name] = _by_layer_type(value)
    if "rope_scaling" in normalised and "rope_parameters" in normalised:
        # Files of both generations of transformers have both, and the newer reads the newer.
        del normalised["rope_scaling"]
    return normalised


def check_rope(entries: JsonObject, head: int) -> None:
    """Check normalised entries against the width of an attention head.

    Raises:
        ModelUnsupported: naming what does not fit.
    """
    value = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    assert isinstance(value, dict)  # Entries are normalised.
    kinds = [entry for entry in value.values() if isinstance(entry, dict)] or [value]
    share = number(entries.get("partial_rotary_factor", 1.0)) or 1.0
    for kind in kinds:
        share = number(kind.get("partial_rotary_factor", share)) or 1.0
        width = int(head * share)
        # Tiny models of tests have heads of width 1, which transformers lets pass.
        if width == head and head % 2 and head > 4:
            raise ModelUnsupported(f"The model's config.json has rotary embeddings over heads of odd width {head}.")
        for name in ("short_factor", "long_factor"):
            factors = kind.get(name)
            if isinstance(factors, list) and len(factors) != width // 2:
                raise ModelUnsupported(
                    f"The model's config.json has rotary embeddings with {len(factors)} numbers in {name}, and its "
                    f"heads need {width // 2}."
                )


def _by_layer_type(value: JsonObject) -> JsonValue:
    """One kind for all layers, or an object of kinds by type of layer."""
    nested = {key for key, entry in value.items() if isinstance(entry, dict)}
    if not nested:
        return _one_kind(value)
    return {key: _one_kind(entry) if isinstance(entry, dict) else entry for key, entry in value.items()}


def _one_kind(value: JsonObject) -> JsonObject:
    kind = value.get("rope_type") or value.get("type") or "default"
    if not isinstance(kind, str) or (kind := _RENAMED.get(kind, kind)) not in _REQUIRED:
        raise ModelUnsupported(
            f"The model's config.json has rotary embeddings of a kind that is not known: {str(kind)[:40]!r}; the "
            f"engine computes {', '.join(_REQUIRED)}."
        )
    parameters = {
        name: _parameter(name, entry) for name, entry in value.items() if name != "type" and entry is not None
    }
    missing = [name for name in _REQUIRED[kind] if name not in parameters]
    if missing:
        raise ModelUnsupported(f"The model's config.json has rotary embeddings of kind {kind} without {missing[0]}.")
    return {**parameters, "rope_type": kind}


def _parameter(name: str, value: JsonValue) -> JsonValue:
    if name in _LISTS or isinstance(value, list):
        numbers = [number(item) for item in value] if isinstance(value, list) else [None]
        if any(item is None for item in numbers):
            raise _no_number(name, value)
        return list(numbers)
    if name == "rope_type" or isinstance(value, bool):
        return value
    if (parsed := number(value)) is None:
        if isinstance(value, str) and not name.endswith(("factor", "theta", "fast", "slow", "embeddings")):
            return value
        raise _no_number(name, value)
    if name in ("factor", "rope_theta") and parsed <= 0:
        raise _no_number(name, value)
    return int(parsed) if name in _WHOLE_NUMBERS and parsed == int(parsed) else parsed


def _no_number(name: str, value: JsonValue) -> ModelUnsupported:
    return ModelUnsupported(
        f"The model's config.json has rotary embeddings with {name[:40]} {repr(value)[:40]}, which is no usable number."
    )
