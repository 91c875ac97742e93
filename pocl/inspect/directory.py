"""Facts of a model directory, as `save_pretrained` writes it."""

import re
from pathlib import Path
from types import MappingProxyType

from pydantic import JsonValue

from pocl.errors import ModelUnsupported
from pocl.inspect.chat_templates import read_chat_templates
from pocl.inspect.facts import MAX_LAYERS, ModelFacts
from pocl.inspect.reading import JsonObject, bounded_int, read_object
from pocl.inspect.tokens import read_tokens
from pocl.inspect.weights import StoredWeights, read_weights

_CONFIG_LIMIT = 4 << 20
_TOKENIZER_CONFIG_LIMIT = 16 << 20
_SIZE_LIMIT = 1 << 24

# Families name the same size differently.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def inspect_directory(directory: Path) -> ModelFacts:
    """Read the facts out of config.json, the tokenizer's files and the safetensors headers.

    Raises:
        ModelUnsupported: see :func:`pocl.inspect.inspect_model`.
        OSError: a file cannot be read.
    """
    config, tokenizer_config = read_supported_configs(directory)
    weights = read_weights(directory)
    layers = _size(config, _LAYERS)
    if layers > MAX_LAYERS:
        raise ModelUnsupported(f"The model has more than {MAX_LAYERS} layers.")
    vocabulary, hidden = _size(config, ("vocab_size",)), _size(config, _HIDDEN)
    if vocabulary * hidden > weights.parameters:
        raise ModelUnsupported("The model's weights are smaller than the embeddings that its config.json describes.")
    tied = _is_tied(config, weights)
    return ModelFacts(
        family=_family(config),
        vocabulary_size=vocabulary,
        layers=layers,
        hidden_size=hidden,
        parameters=weights.parameters - (weights.head_parameters if tied else 0),
        layer_parameters=_parameters_by_layer(weights, layers),
        size_bytes=weights.size_bytes,
        max_positions=_optional_size(config, _POSITIONS),
        has_chat_template=bool(read_chat_templates(directory, tokenizer_config)),
        tied_embeddings=tied,
        tokens=MappingProxyType(read_tokens(directory, tokenizer_config)),
    )


def read_supported_configs(directory: Path) -> tuple[JsonObject, JsonObject]:
    """Read the config and the tokenizer's config of a model that can be distilled; its weights need not be there.

    Raises:
        ModelUnsupported: it needs code of its own, or is no causal language model in full precision.
        OSError: a file cannot be read.
    """
    config = read_object(directory / "config.json", limit=_CONFIG_LIMIT)
    tokenizer_config = _tokenizer_config(directory)
    _check_no_remote_code(config, tokenizer_config)
    _check_causal_language_model(config)
    return config, tokenizer_config


def _tokenizer_config(directory: Path) -> JsonObject:
    path = directory / "tokenizer_config.json"
    return read_object(path, limit=_TOKENIZER_CONFIG_LIMIT) if path.is_file() else {}


def _check_no_remote_code(config: JsonObject, tokenizer_config: JsonObject) -> None:
    if config.get("auto_map") or tokenizer_config.get("auto_map"):
        raise ModelUnsupported(
            "The model needs code of its own (auto_map), which is never run; use an architecture that "
            "transformers ships."
        )


def _check_causal_language_model(config: JsonObject) -> None:
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise ModelUnsupported("The model's config.json has architectures that are no list.")
    if architectures and not any(_is_causal(name) for name in architectures):
        name = repr(architectures[0])[:80] if isinstance(architectures[0], str) else "What config.json names"
        raise ModelUnsupported(f"{name} is not a causal language model.")
    if config.get("is_encoder_decoder"):
        raise ModelUnsupported("The model is an encoder-decoder; only causal language models can be distilled.")
    if config.get("quantization_config"):
        raise ModelUnsupported("The model is quantised; give its full-precision weights, or a GGUF file.")


def _is_causal(architecture: JsonValue) -> bool:
    return isinstance(architecture, str) and architecture.endswith(("ForCausalLM", "LMHeadModel"))


def _family(config: JsonObject) -> str:
    family = config.get("model_type")
    if not isinstance(family, str) or not re.fullmatch(r"[\w.-]{1,64}", family):
        raise ModelUnsupported("The model's config.json names no model_type.")
    return family


def _size(config: JsonObject, names: tuple[str, ...]) -> int:
    size = _optional_size(config, names)
    if size is None:
        raise ModelUnsupported(f"The model's config.json has no usable {names[0]}.")
    return size


def _optional_size(config: JsonObject, names: tuple[str, ...]) -> int | None:
    for name in names:
        if size := bounded_int(config.get(name), at_most=_SIZE_LIMIT):
            return size
    return None


def _is_tied(config: JsonObject, weights: StoredWeights) -> bool:
    configured = config.get("tie_word_embeddings")
    return configured if isinstance(configured, bool) else weights.head_parameters == 0


def _parameters_by_layer(weights: StoredWeights, layers: int) -> tuple[int, ...]:
    if set(weights.layer_parameters) - set(range(layers)):
        raise ModelUnsupported("The model's weights have more layers than its config.json says.")
    missing = layers - len(weights.layer_parameters)
    if missing:
        raise ModelUnsupported(f"The model's weights lack {missing} of the {layers} layers of its config.json.")
    return tuple(weights.layer_parameters[index] for index in range(layers))
