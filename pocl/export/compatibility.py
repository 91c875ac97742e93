"""Files that the current transformers and 4.57 both read, so that serving stacks that lag behind give the same logits.

transformers 5 writes other names than 4 did, and 4 takes its own default, in silence, for a name that it misses:
`rope_parameters` holds what `rope_theta`, `rope_scaling` and `partial_rotary_factor` held, `dtype` what `torch_dtype`
did, and `tokenizer_class` may name a class that 4 does not have. Both spellings are written, and where the two cannot
both be served, :func:`required_transformers` says from which version on a directory is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import transformers
from transformers import AutoConfig, PreTrainedConfig

from pocl.inspect.chat_templates import DEFAULT_TEMPLATE

OLDEST: Final = "4.57"
"""The oldest transformers for which directories are written."""
FAMILIES_OF_OLDEST: Final = frozenset(
    [
        "arcee",
        "aria_text",
        "biogpt",
        "bitnet",
        "bloom",
        "codegen",
        "cohere",
        "cohere2",
        "ctrl",
        "diffllama",
        "doge",
        "dots1",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "falcon",
        "falcon_mamba",
        "flex_olmo",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_neox_japanese",
        "gpt_oss",
        "gptj",
        "granite",
        "granitemoe",
        "granitemoeshared",
        "helium",
        "jetmoe",
        "lfm2",
        "llama",
        "mamba",
        "minimax",
        "ministral",
        "mistral",
        "mixtral",
        "mpt",
        "olmoe",
        "openai-gpt",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "rwkv",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
        "vaultgemma",
        "xglm",
    ]
)
"""The values of `model_type` for which 4.57 gave the logits of the current transformers when it was tried, with
rotary embeddings of every type in :data:`_ROPE_TYPES_OF_OLDEST`."""
FAMILIES_WITH_PLAIN_ROPE: Final = frozenset({"hunyuan_v1_dense", "hunyuan_v1_moe", "nemotron", "olmo", "olmo2"})
"""Those for which it did so with rotary embeddings that are not scaled."""
_ROPE_TYPES_OF_OLDEST: Final = {"default", "linear", "dynamic", "yarn", "longrope", "llama3"}
_GENERIC_TOKENIZER: Final = "PreTrainedTokenizerFast"
"""The tokenizer class that does as tokenizer.json says, in every version."""
_CONFIG_FILE, _TOKENIZER_FILE, _TOKENIZER_CONFIG_FILE = "config.json", "tokenizer.json", "tokenizer_config.json"

Config = dict[str, Any]


def write_config(directory: Path, changes: Mapping[str, Any]) -> str:
    """Write `changes` and the names of transformers 4 into `config.json`, which transformers has written.

    Returns:
        The requirement on the version of transformers that reads the directory, e.g. `transformers>=4.57`.
    """
    path = directory / _CONFIG_FILE
    config: Config = json.loads(path.read_bytes()) | dict(changes)
    former_names = _former_names(config)
    requirement = required_transformers(config)
    if former_names is not None and _is_read_alike(config, config | former_names):
        config |= former_names
    else:
        requirement = _current()
    path.write_text(_to_json(config), encoding="utf-8")
    return requirement


def write_tokenizer_config(directory: Path, *, chat_templates: Mapping[str, str], pad_token: str | None) -> None:
    """Make `tokenizer_config.json`, which transformers has written, one that 4.57 reads too, with these chat templates.

    A tokenizer without `tokenizer.json` keeps its class and its names, which each version reads for itself.

    Args:
        pad_token: The token that pads; None leaves the tokenizer's own.
    """
    path = directory / _TOKENIZER_CONFIG_FILE
    config: Config = json.loads(path.read_bytes())
    if (directory / _TOKENIZER_FILE).is_file():
        config["tokenizer_class"] = _GENERIC_TOKENIZER
        # What 4.57 expects under this name is an object, and the current version reads the other name as well.
        extra = config.pop("extra_special_tokens", None)
        if isinstance(extra, list) and extra:
            config["additional_special_tokens"] = extra
        elif extra:
            config["extra_special_tokens"] = extra
    # TGI's router reads templates from here alone; transformers prefers the files of their own, which are equal.
    if chat_templates.keys() == {DEFAULT_TEMPLATE}:
        config["chat_template"] = chat_templates[DEFAULT_TEMPLATE]
    elif chat_templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in sorted(chat_templates.items())]
    if pad_token is not None:
        config["pad_token"] = pad_token
    path.write_text(_to_json(config), encoding="utf-8")


def required_transformers(config: Mapping[str, Any]) -> str:
    """The requirement on the version of transformers that computes what was trained, as `pip` takes it."""
    types = {each.get("rope_type", "default") for each in _rope_of_layer_types(config).values()}
    family = config.get("model_type")
    is_known = (family in FAMILIES_OF_OLDEST and types <= _ROPE_TYPES_OF_OLDEST) or (
        family in FAMILIES_WITH_PLAIN_ROPE and types <= {"default"}
    )
    return f"transformers>={OLDEST}" if is_known else _current()


def _current() -> str:
    return "transformers>=" + ".".join(transformers.__version__.split(".")[:2])


def _former_names(config: Config) -> Config | None:
    """What transformers 4 reads under names that 5 does not write; None where its names cannot say the same."""
    names: Config = {}
    if isinstance(config.get("dtype"), str):
        names["torch_dtype"] = config["dtype"]
    family = config.get("model_type")
    if family == "qwen3_moe" and "num_local_experts" in config:
        names["num_experts"] = config["num_local_experts"]
    rope = _rope_of_layer_types(config)
    if not rope:
        return names
    if rope.keys() == {""}:
        return names | _rope_names(rope[""], family)
    if rope.keys() != {"full_attention", "sliding_attention"} or family not in ("gemma3_text", "gemma3n_text"):
        return None
    local_theta = rope["sliding_attention"].get("rope_theta")
    return names | _rope_names(rope["full_attention"], family) | {"rope_local_base_freq": local_theta}


def _rope_names(rope: Mapping[str, Any], family: str | None) -> Config:
    names: Config = {"rope_theta": rope.get("rope_theta")}
    if "partial_rotary_factor" in rope:
        names["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if family in ("gpt_neox", "gpt_neox_japanese"):
        names |= {"rotary_emb_base": rope.get("rope_theta"), "rotary_pct": rope.get("partial_rotary_factor")}
    if rope.get("rope_type", "default") != "default":
        names["rope_scaling"] = {
            name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")
        }
    return {name: value for name, value in names.items() if value is not None}


def _rope_of_layer_types(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The rotary embeddings by the type of layer, under "" where all layers have the same; empty without any."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return {}
    if all(isinstance(value, Mapping) for value in rope.values()):
        return dict(rope)
    return {"": rope}


def _read(config: Config) -> PreTrainedConfig:
    """The config as the current transformers makes it: a config changes the objects that it is made of."""
    # Infinities are saved as objects, which reading a file turns back.
    entries = PreTrainedConfig._decode_special_floats(json.loads(json.dumps(config)))
    return AutoConfig.for_model(**entries)


def _is_read_alike(config: Config, extended: Config) -> bool:
    """Whether the current transformers makes the same config of both, but for names that it does not know."""
    try:
        plain, full = (_read(each).to_dict() for each in (config, extended))
    except (ValueError, TypeError, KeyError):
        return False
    return all(full.get(name) == value for name, value in plain.items())


def _to_json(config: Config) -> str:
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
