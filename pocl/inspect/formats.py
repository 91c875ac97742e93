"""Directories that hold something else than a model in safetensors: each is named, with what to do about it."""

import json
import re
from pathlib import Path

from pocl.errors import ModelUnsupported

_ADAPTER_CONFIG = "adapter_config.json"
_CONFIG_LIMIT = 1 << 20
_SHARD_OF_TRAINING = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_MAX_LISTED = 10_000
"""More files than a model has are not looked at."""


def refuse_adapter(directory: Path) -> None:
    """Refuse a directory with an adapter, whether its base lies beside it or not: the base alone is another model.

    Raises:
        ModelUnsupported: naming the kind of adapter, its base, and how to merge them.
        OSError: a file cannot be read.
    """
    path = directory / _ADAPTER_CONFIG
    if not path.is_file():
        return
    kind, base = _adapter(path)
    raise ModelUnsupported(
        f"The directory holds {kind} ({_ADAPTER_CONFIG}){base}, and adapters are not loaded: merge it into its base "
        "with peft (AutoPeftModelForCausalLM.from_pretrained(directory).merge_and_unload()), save the result with "
        "save_pretrained() together with the tokenizer, and give that directory; where the base alone is meant, give "
        "it without the adapter's files."
    )


def refuse_sharded_state(directory: Path) -> None:
    """Refuse a directory with shards of a distributed training, which transformers reads in place of the model beside
    them.

    Raises:
        ModelUnsupported: naming one.
        OSError: the directory cannot be read.
    """
    for number, path in enumerate(directory.iterdir()):
        if _SHARD_OF_TRAINING.fullmatch(path.name):
            raise ModelUnsupported(
                f"The directory holds a sharded training state of transformers ({path.name}); save the model with "
                "save_pretrained(), and give a directory with that alone."
            )
        if number >= _MAX_LISTED:
            break


def _adapter(path: Path) -> tuple[str, str]:
    """The kind of an adapter and its base, as parts of a sentence."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_CONFIG_LIMIT))
    except (ValueError, RecursionError):
        content = None
    entries = content if isinstance(content, dict) else {}
    kind, base = entries.get("peft_type"), entries.get("base_model_name_or_path")
    # The path of a base on the machine that trained the adapter is told by its last part alone.
    name = base.rstrip("/").rsplit("/", 1)[-1][:80] if isinstance(base, str) else ""
    return (
        f"a {kind[:20]} adapter" if isinstance(kind, str) and kind else "an adapter",
        f" of {name!r}" if name else "",
    )


def explain_missing_weights(directory: Path) -> str:
    """Why a directory without `model.safetensors` or its index is no model, and what to do, as a sentence."""
    names = []
    for path in directory.iterdir():
        names.append(path.name.lower())
        if len(names) >= _MAX_LISTED:
            break
    names.sort()
    for expression, sentence in _KINDS:
        for name in names:
            if re.fullmatch(expression, name):
                return sentence.format(name=name[:60])
    return (
        "The model directory has neither model.safetensors nor model.safetensors.index.json; save the model with "
        "save_pretrained()."
    )


_PICKLED = (
    "The model's weights are pickled ({name}), which can run code; load it with transformers and save it with "
    "save_pretrained(), which writes safetensors."
)
_KINDS = (
    (
        r"consolidated.*\.(?:pth|safetensors)",
        "The directory holds weights in the format of the model's makers ({name}); give the same model in the format "
        "of transformers (config.json and model.safetensors), which most makers publish too.",
    ),
    (
        r"zero_to_fp32\.py|global_step.*|.*zero_pp_rank.*",
        "The directory holds a sharded training state of DeepSpeed ({name}); write its weights with zero_to_fp32.py "
        "--safe_serialization, or save the model with save_pretrained().",
    ),
    (
        r".*\.distcp|pytorch_model_fsdp.*",
        "The directory holds a sharded training state of FSDP ({name}); merge it with accelerate merge-weights, or "
        "save the model with save_pretrained().",
    ),
    (r"(?:pytorch_)?model.*\.(?:bin|bin\.index\.json|pt|pth|ckpt)", _PICKLED),
    (r".*\.gguf", "The directory holds GGUF ({name}); give the path of the .gguf file itself."),
    (r".*\.onnx|onnx", "The directory holds ONNX ({name}), which cannot be trained; give the model's safetensors."),
    (
        r".*\.(?:h5|msgpack)",
        "The directory holds weights of TensorFlow or Flax ({name}); load it with transformers and save it with "
        "save_pretrained(), which writes safetensors.",
    ),
    (
        r"adapter_model.*",
        "The directory holds an adapter ({name}) without its adapter_config.json; merge it into its base with peft's "
        "merge_and_unload() and give the result.",
    ),
    (
        r"(?:optimizer|scheduler|rng_state).*",
        "The directory holds the state of a training ({name}) without the model's weights; save the model with "
        "save_pretrained().",
    ),
    (r".*\.(?:bin|pt|pth|ckpt|pkl)", _PICKLED),
    (
        r".*\.safetensors",
        "The directory holds safetensors ({name}) under another name than model.safetensors, and no index of shards "
        "(model.safetensors.index.json); save the model with save_pretrained().",
    ),
)
"""Expressions for the name of a file in lower case, in the order in which they are tried, and what is said of such a
directory."""
