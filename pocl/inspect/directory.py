"""Facts of a model directory, as `save_pretrained` writes it."""

from pathlib import Path
from types import MappingProxyType

from pocl.errors import ModelUnsupported
from pocl.inspect.chat_templates import read_chat_templates
from pocl.inspect.config import ModelConfig, read_config
from pocl.inspect.facts import ModelFacts, ModelWarning
from pocl.inspect.generation_config import read_generation_config
from pocl.inspect.reading import JsonObject, read_object
from pocl.inspect.shapes import check_shapes, weights_outside
from pocl.inspect.tokens import read_tokens
from pocl.inspect.weights import StoredModel, StoredWeights, is_mtp, layer_of, read_weights, stores_same, unused_weights

_TOKENIZER_CONFIG_LIMIT = 16 << 20


def inspect_directory(directory: Path) -> ModelFacts:
    """Read the facts out of config.json, the tokenizer's files and the safetensors headers.

    Raises:
        ModelUnsupported: see :func:`pocl.inspect.inspect_model`.
        OSError: a file cannot be read.
    """
    config, tokenizer_config = read_supported_configs(directory)
    stored = read_weights(directory, text_part=config.whole_family is not None, quantised_by=config.quantised_by)
    layers, vocabulary, hidden = (config.size(name) for name in ("num_hidden_layers", "vocab_size", "hidden_size"))
    weights = stored.sizes(layers)
    if vocabulary * hidden > weights.parameters:
        raise ModelUnsupported("The model's weights are smaller than the embeddings that its config.json describes.")
    _check_layer_count(config, stored, layers)
    layer_parameters = _parameters_by_layer(weights, layers)
    is_described = check_shapes(config, stored)
    tied = _is_tied(directory, config, stored)
    tokens = read_tokens(directory, tokenizer_config)
    generation = read_generation_config(directory, config.entries, vocabulary)
    return ModelFacts(
        family=config.family,
        vocabulary_size=vocabulary,
        layers=layers,
        hidden_size=hidden,
        parameters=weights.parameters - (weights.head_parameters if tied else 0),
        layer_parameters=layer_parameters,
        size_bytes=weights.size_bytes,
        max_positions=config.optional_size("max_position_embeddings"),
        has_chat_template=bool(read_chat_templates(directory, tokenizer_config)),
        tied_embeddings=tied,
        dtype=stored.dtype(),
        idle_layer_parameters=weights.idle_parameters(layers, experts=config.experts, chosen=config.experts_per_token),
        tokens=MappingProxyType(tokens),
        is_described=is_described,
        warnings=(
            *config.warnings,
            *_weight_warnings(stored, layers),
            *(unused_weights(weights_outside(config, stored), layers) if is_described else ()),
            *_token_warnings(tokens, vocabulary),
            *generation.warnings,
        ),
    )


def read_supported_configs(directory: Path) -> tuple[ModelConfig, JsonObject]:
    """Read the config and the tokenizer's config of a model that can be distilled; its weights need not be there.

    Raises:
        ModelUnsupported: as :func:`pocl.inspect.config.read_config` says, or the tokenizer needs code of its own.
        OSError: a file cannot be read.
    """
    config = read_config(directory)
    path = directory / "tokenizer_config.json"
    tokenizer_config = read_object(path, limit=_TOKENIZER_CONFIG_LIMIT) if path.is_file() else {}
    if tokenizer_config.get("auto_map"):
        raise ModelUnsupported(
            "The model's tokenizer needs code of its own (auto_map), which is never run; use an architecture that "
            "transformers ships."
        )
    return config, tokenizer_config


def _is_tied(directory: Path, config: ModelConfig, stored: StoredModel) -> bool:
    """Whether the output head is the embedding: one that is stored with other weights is not, as a config may say."""
    head, embeddings = stored.head(), stored.embeddings()
    if not config.ties_embeddings() or head is None or embeddings is None:
        return config.ties_embeddings()
    return stores_same(directory, head, embeddings)


def _check_layer_count(config: ModelConfig, stored: StoredModel, layers: int) -> None:
    """Check that what lies behind the layers is for multi-token prediction."""
    behind = {number for tensor in stored.tensors if (number := layer_of(tensor.name)) is not None and number >= layers}
    if len(behind) > config.mtp_layers():
        raise ModelUnsupported("The model's weights have more layers than its config.json says.")


def _weight_warnings(stored: StoredModel, layers: int) -> list[ModelWarning]:
    warnings = []
    if stored.names.removed:
        prefixes = ", ".join(repr(prefix) for prefix in stored.names.removed)
        message = f"the weights were saved out of a wrapper: {prefixes} is taken off their names"
        warnings.append(ModelWarning("weights_prefix_removed", message))
    extra = sum(is_mtp(tensor.name, layers) for tensor in stored.tensors)
    if extra:
        message = f"{extra} weights for multi-token prediction are not loaded, trained or saved"
        warnings.append(ModelWarning("mtp_layers_ignored", message))
    return warnings


def _token_warnings(tokens: dict[str, int], vocabulary: int) -> list[ModelWarning]:
    beyond = sorted((id_, token) for token, id_ in tokens.items() if id_ >= vocabulary)
    if not beyond:
        return []
    id_, token = beyond[0]
    message = (
        f"{len(beyond)} tokens have no embedding, among them {token[:40]!r} (id {id_} of {vocabulary} embeddings): "
        "rows that need one are refused"
    )
    return [ModelWarning("tokens_without_embedding", message)]


def _parameters_by_layer(weights: StoredWeights, layers: int) -> tuple[int, ...]:
    missing = layers - len(weights.layer_parameters)
    if missing:
        raise ModelUnsupported(f"The model's weights lack {missing} of the {layers} layers of its config.json.")
    return tuple(weights.layer_parameters[index] for index in range(layers))
