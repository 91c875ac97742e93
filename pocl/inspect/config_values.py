"""Entries of config.json in the types that transformers takes: older tools wrote integers for floats, text for numbers,
and null for what they left to the code.
"""

import math
import re

from pydantic import JsonValue

from pocl.errors import ModelUnsupported
from pocl.inspect.families import family_table
from pocl.inspect.reading import JsonObject

_LARGEST = 1 << 53
"""Beyond it a float is no longer every whole number, and no size of a model is as large."""
_IGNORED = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
        "_experts_implementation", "_experts_implementation_internal", "_flash_attn_2_enabled", "_name_or_path",
        "assistant_ensemble_weight", "attn_implementation", "auto_map", "base_model_ep_plan", "base_model_pp_plan",
        "base_model_tp_plan", "cache_implementation", "compile_config", "continuous_batching_config",
        "distributed_config", "early_stopping", "experts_implementation", "fusion_config", "id2label", "label2id",
        "max_new_tokens", "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "problem_type",
        "pruned_heads", "return_dict", "torchscript", "transformers_weights", "use_bfloat16", "use_return_dict",
        "watermarking_config",
    }
)  # fmt: skip
"""Entries that say how another program ran the model or generates with it, name another file for its weights, or the
labels of a classifier."""
_WITHOUT_MEANING_IF_EMPTY = frozenset({"compression_config", "per_layer_config", "quantization_config"})
_PARTS = frozenset({"decoder", "encoder", "generator", "text_config", "text_encoder"})
"""Configs of parts, which transformers takes for the text model's wherever they are."""
_MAY_BE_NULL = re.compile(
    r"_token_id$|_token_index$|dropout|pdrop|initializer|init_std|use_cache|aux_loss|jitter|pretraining_tp|problem_type"
)
"""Entries that change no output of a loaded model: where null is not taken, the family's own value is."""
_NUMBERS = frozenset(
    {"rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base", "rope_local_base_freq", "rotary_dim"}
)
"""Numbers that families take without naming their type."""
_DTYPES = {
    "float": "float32", "fp32": "float32", "float32": "float32", "half": "float16", "fp16": "float16",
    "float16": "float16", "bf16": "bfloat16", "bfloat16": "bfloat16", "double": "float64", "float64": "float64",
}  # fmt: skip
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_DESCRIPTIONS = {
    "i": "a whole number", "f": "a number", "b": "true or false", "s": "text", "n": "null", "l": "a list",
    "o": "an object",
}  # fmt: skip


_TAGGED = {"Infinity", "-Infinity", "NaN"}


def normalised_entries(entries: JsonObject, family: str) -> JsonObject:
    """The entries of a config of `family` in the types that transformers takes.

    Raises:
        ModelUnsupported: naming an entry that has no such form, and what it must be.
    """
    table = family_table()
    normalised: JsonObject = {}
    for name, value in entries.items():
        if _is_passed_over(name, value, family):
            continue
        if name in ("dtype", "torch_dtype"):
            if dtype := _dtype(value):
                normalised["dtype"] = dtype
            continue
        _check_finite(name, value)
        value = _untagged(value)
        _check_ids(name, value)
        letters = table.types(family, name) or ("fin" if name in _NUMBERS else "")
        if value is None and letters and "n" not in letters:
            value = _without_null(name, entries, family, letters)
            if value is None:
                continue
        value = _converted(name, value, letters) if letters else value
        if not (name == "initializer_range" and not 0 <= (number(value) or 0) <= 1):
            normalised[name] = value
        if name.endswith(("_eps", "epsilon")) and (number(value) or 0) < 0:
            raise _wrong_type(name, value, "f")
    for name in _ACTIVATIONS:
        activation = normalised.get(name)
        if isinstance(activation, str) and activation not in family_table().activations:
            raise ModelUnsupported(
                f"The model's config.json names an activation that is not known: {activation[:40]!r}."
            )
    return normalised


def _is_passed_over(name: str, value: JsonValue, family: str) -> bool:
    if name in _IGNORED or name.startswith("__"):
        return True
    if name in _PARTS and name not in family_table().fields.get(family, {}):
        return True
    return name in _WITHOUT_MEANING_IF_EMPTY and not value


def number(value: JsonValue) -> int | float | None:
    """`value` as a finite number, also where it is spelled as text; else None. JSON's true is no number."""
    if isinstance(value, str):
        try:
            value = int(value) if re.fullmatch(r"[+-]?\d{1,18}", value.strip()) else float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        return None
    return value


def _dtype(value: JsonValue) -> str | None:
    """The dtype that the weights are stored in, as torch spells it; None where the weights themselves say it."""
    return _DTYPES.get(value.removeprefix("torch.").lower()) if isinstance(value, str) else None


def _check_ids(name: str, value: JsonValue) -> None:
    if name.endswith("_token_id") and isinstance(value, list) and any(_letter(each) != "i" for each in value):
        raise _wrong_type(name, value, "i")


def _check_finite(name: str, value: JsonValue) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool) and not _is_finite(value):
        raise ModelUnsupported(f"The model's config.json has {name[:60]} {str(value)[:20]}, which is no usable number.")


def _untagged(value: JsonValue) -> JsonValue:
    """The value with infinities as numbers, which transformers saves as objects: Mamba 2's limits of its time steps."""
    if isinstance(value, dict):
        tag = value.get("__float__")
        if len(value) == 1 and isinstance(tag, str) and tag in _TAGGED:
            return float(tag)
        return {name: _untagged(entry) for name, entry in value.items()}
    return [_untagged(entry) for entry in value] if isinstance(value, list) else value


def _is_finite(value: int | float) -> bool:
    return abs(value) <= _LARGEST if isinstance(value, int) else math.isfinite(value)


def _without_null(name: str, entries: JsonObject, family: str, letters: str) -> JsonValue:
    """What stands for a null that the family does not take: None for its own value."""
    if name == "num_key_value_heads":
        # As many as attention heads: what null has meant since there are such heads.
        own = family_table().size_names(family, "num_attention_heads")
        heads = next((entries[other] for other in own if entries.get(other) is not None), None)
        return heads if heads is not None else family_table().default_size(family, "num_attention_heads")
    if _MAY_BE_NULL.search(name) or letters == "b":
        return None
    raise _wrong_type(name, None, letters)


def _converted(name: str, value: JsonValue, letters: str) -> JsonValue:
    """`value` as one of the types that `letters` name, without loss."""
    if _letter(value) in letters:
        return value
    if isinstance(value, bool) and "b" not in letters:
        raise _wrong_type(name, value, letters)
    if "b" in letters and (value in (0, 1) or str(value).lower() in ("true", "false")):
        return value == 1 or str(value).lower() == "true"
    as_number = number(value)
    if as_number is not None:
        if "i" in letters and as_number == int(as_number):
            return int(as_number)
        if "f" in letters:
            return float(as_number)
    if isinstance(value, str) and value.strip().lower() in ("none", "null") and "n" in letters:
        return None
    raise _wrong_type(name, value, letters)


def _letter(value: JsonValue) -> str:
    if value is None:
        return "n"
    types = {bool: "b", int: "i", float: "f", str: "s", list: "l", dict: "o"}
    return types[type(value)]


def _wrong_type(name: str, value: JsonValue, letters: str) -> ModelUnsupported:
    wanted = " or ".join(_DESCRIPTIONS[letter] for letter in letters)
    given = "null" if value is None else repr(value)[:40]
    return ModelUnsupported(
        f"The model's config.json has {name[:60]} {given}, which must be {wanted}; correct the entry in the file."
    )
