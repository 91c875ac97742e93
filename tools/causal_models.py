"""Writes `pocl/inspect/causal_models.json`: which causal language models the installed transformers can build, and of
which type each entry of their configs is.

The service checks configs by this table, for it has no transformers. Run it after an update of transformers:

    python -m tools.causal_models
"""

import dataclasses
import json
import re
import types
import typing
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import _LEGACY_LAYER_TYPE_REMAP, ALLOWED_LAYER_TYPES
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TABLE: Final = Path(__file__).parents[1] / "pocl" / "inspect" / "causal_models.json"
_SIZES: Final = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "intermediate_size",
)  # fmt: skip
_UNIFORM: Final = (
    "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "granite", "helium",
    "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "olmo", "olmo2", "olmo3", "qwen2", "qwen3",
    "seed_oss", "smollm3", "vaultgemma",
)  # fmt: skip
"""Families whose layers are all alike, whatever else their configs say."""
_BIASES: Final = ("attention_bias", "attention_out_bias", "mlp_bias", "use_bias", "use_qk_norm")
"""Entries of configs that add weights to a layer."""
_DISTINCT: Final = {
    "vocab_size": 331, "hidden_size": 120, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
    "head_dim": 28, "intermediate_size": 176, "pad_token_id": 0,
}  # fmt: skip
_LETTERS: Final = {int: "i", float: "f", bool: "b", str: "s", dict: "o", list: "l", tuple: "l", type(None): "n"}


def build_table() -> dict[str, Any]:
    """The table as it is written.

    `classes`: model_type -> the class that AutoModelForCausalLM builds. `text_parts`: model_type of a model of several
    modalities -> model_type of its text model where its config names none. `fields`: model_type -> entry -> the types
    of JSON that it takes, a letter each (i, f, b, s for text, n for null, l for a list, o for an object). `sizes`:
    model_type -> common name of a size -> its name in the config of the family. `decoders`: families that are decoders
    only where `is_decoder` is true. `defaults`: model_type -> size -> what the family takes where a config names none.
    `divisible`: families whose hidden size must be a multiple of their heads. `activations`, `layer_types`: the names
    that transformers knows. `tied`: families whose output head is the embedding unless a config says otherwise.
    `layers`: of families whose layers are all alike, name of a weight within a layer -> its shape in words: hidden,
    inter (the feed-forward width), q and kv (heads times their width), head (that width), heads and groups (of keys and
    values). `biases`: of the same families, entry of a config -> the weights that it adds to a layer where it is true.
    `outside`: of the same families, the weights outside of layers, embeddings and head, each of the hidden size.
    `true_by_default`: those of these entries that hold where a config leaves them out.
    """
    classes = dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))
    text_parts = {}
    for model_type in sorted(CONFIG_MAPPING):
        text = CONFIG_MAPPING[model_type].sub_configs_defaults.get("text_config")
        if text is not None and text.model_type:
            text_parts[model_type] = text.model_type
    families = sorted({*classes, *(text for text in text_parts.values() if text in CONFIG_MAPPING)})
    configs = {model_type: CONFIG_MAPPING[model_type] for model_type in families}
    return {
        "classes": classes,
        "text_parts": text_parts,
        "fields": {model_type: _fields(config) for model_type, config in configs.items()},
        "sizes": {
            model_type: dict(sorted(config.attribute_map.items()))
            for model_type, config in configs.items()
            if config.attribute_map
        },
        "defaults": {model_type: _default_sizes(config) for model_type, config in configs.items()},
        "decoders": [model_type for model_type in classes if _is_encoder_by_default(configs[model_type])],
        "layers": {
            model_type: _layer_weights(configs[model_type], **dict.fromkeys(_BIASES, False)) for model_type in _UNIFORM
        },
        "biases": {
            model_type: {flag: dict(sorted(_biases(configs[model_type], flag).items())) for flag in _BIASES}
            for model_type in _UNIFORM
        },
        "outside": {model_type: _outside_weights(configs[model_type]) for model_type in _UNIFORM},
        "divisible": [model_type for model_type, config in configs.items() if _must_divide(config)],
        "true_by_default": {
            model_type: [flag for flag in _BIASES if _default(configs[model_type], flag) is True]
            for model_type in _UNIFORM
        },
        "tied": [model_type for model_type, config in configs.items() if _is_tied(config)],
        "activations": sorted(ACT2FN),
        "layer_types": sorted({*ALLOWED_LAYER_TYPES, *_LEGACY_LAYER_TYPE_REMAP}),
    }


def _default_sizes(config: type[PreTrainedConfig]) -> dict[str, int]:
    names = {config.attribute_map.get(name, name): name for name in _SIZES}
    return {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.name in names and type(field.default) is int
    }


def _biases(config_class: type[PreTrainedConfig], flag: str) -> dict[str, str]:
    """The weights of a layer that an entry of the config adds."""
    if flag not in {field.name for field in dataclasses.fields(config_class)}:
        return {}
    with_biases = _layer_weights(config_class, **{flag: True})
    return dict(with_biases.items() - _layer_weights(config_class, **{flag: False}).items())


def _layer_weights(config_class: type[PreTrainedConfig], **flags: bool) -> dict[str, str]:
    """The weights of one layer with their shapes, tried on a model whose sizes are all different."""
    config = config_class.from_dict({**_DISTINCT, **flags})
    head = _DISTINCT["head_dim"]
    names = {
        _DISTINCT["num_attention_heads"] * head: "q",
        _DISTINCT["num_key_value_heads"] * head: "kv",
        head: "head",
        _DISTINCT["intermediate_size"]: "inter",
        _DISTINCT["hidden_size"]: "hidden",
        _DISTINCT["num_attention_heads"]: "heads",
        _DISTINCT["num_key_value_heads"]: "groups",
    }
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    shapes: dict[str, set[str]] = {}
    for name, weight in model.state_dict().items():
        if (match := re.search(r"\.layers\.\d+\.(.*)$", name)) is not None:
            shapes.setdefault(match[1], set()).add(",".join(names[size] for size in weight.shape))
    assert all(len(words) == 1 for words in shapes.values()), config_class
    return {name: words.pop() for name, words in sorted(shapes.items())}


def _outside_weights(config_class: type[PreTrainedConfig]) -> list[str]:
    """The weights outside of layers, embeddings and head, all of the hidden size."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config_class.from_dict(dict(_DISTINCT)))
    outside = {
        name.removeprefix("model."): weight
        for name, weight in model.state_dict().items()
        if ".layers." not in name and not name.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
    assert all(tuple(weight.shape) == (_DISTINCT["hidden_size"],) for weight in outside.values()), config_class
    return sorted(outside)


def _must_divide(config: type[PreTrainedConfig]) -> bool:
    names = {field.name for field in dataclasses.fields(config)}
    hidden, heads = (config.attribute_map.get(name, name) for name in ("hidden_size", "num_attention_heads"))
    if not {hidden, heads} <= names:
        return False
    try:
        config.from_dict({hidden: 100, heads: 7})
    except StrictDataclassClassValidationError:
        return True
    return False


def _is_tied(config: type[PreTrainedConfig]) -> bool:
    return _default(config, "tie_word_embeddings") is True


def _default(config: type[PreTrainedConfig], name: str) -> object:
    return next((field.default for field in dataclasses.fields(config) if field.name == name), None)


def _is_encoder_by_default(config: type[PreTrainedConfig]) -> bool:
    # GPT-NeoX has the entry and attends to the left whatever it says.
    if config.model_type.startswith("gpt_neox"):
        return False
    return any(field.name == "is_decoder" and field.default is False for field in dataclasses.fields(config))


def _fields(config: type[PreTrainedConfig]) -> dict[str, str]:
    fields = {field.name: "".join(sorted(_letters(field.type))) for field in dataclasses.fields(config)}
    return {name: letters for name, letters in sorted(fields.items()) if letters}


def _letters(annotation: Any) -> set[str]:
    """The letters of an annotation; none where any value is taken."""
    if annotation in _LETTERS:
        return {_LETTERS[annotation]}
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return set().union(*(_letters(part) for part in typing.get_args(annotation)))
    if origin in _LETTERS:
        return {_LETTERS[origin]}
    if origin is typing.Literal:
        return set().union(*(_letters(type(value)) for value in typing.get_args(annotation)))
    if isinstance(annotation, type) and (issubclass(annotation, PreTrainedConfig) or typing.is_typeddict(annotation)):
        return {"o"}
    return set()


def render_table() -> str:
    """The text of the file: a line for each family."""
    table = build_table()
    lines = []
    for key, value in table.items():
        if isinstance(value, dict):
            entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{entries}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    TABLE.write_text(render_table())
