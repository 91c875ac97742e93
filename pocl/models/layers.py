"""A model rebuilt with some of its layers, or with another dropout."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from pocl.errors import ModelUnsupported
from pocl.inspect import check_layers_exist
from pocl.inspect.family_support import check_layers_selectable

# Config entries besides those with "layer" in their name that some families give for each layer.
_PER_LAYER = {"intermediate_size", "num_key_value_heads", "num_attention_heads", "head_dim"}
# Lists of the layers that are of a kind, and how many of the first layers are.
_LAYER_INDICES = {"attn_layer_indices", "full_attn_idxs", "mlp_only_layers", "moe_layers", "sparse_layers"}
_FIRST_LAYERS = {"first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"}


def select_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model in fp32 with these layers of `model`, counted from 0, and its embeddings, final norm and head.

    It shares no memory with `model`, and its layers are numbered from 0, as its key-value cache counts them.

    Raises:
        SpecInvalid: there is no such layer.
        ModelUnsupported: the layers cannot be told from the other parts of the model.
    """
    weights = model.state_dict()
    names = names_in_whole(model, layers)
    return rebuild_with_layers(model, layers, {new: weights[old] for new, old in names.items()})


def names_in_whole(model: PreTrainedModel, layers: Sequence[int]) -> dict[str, str]:
    """The weights of a model with these layers of `model`: their names in it, and those in `model`.

    Raises:
        SpecInvalid: there is no such layer.
        ModelUnsupported: the layers cannot be told from the other parts of the model.
    """
    check_layers_selectable(str(model.config.model_type))
    check_layers_exist(layers, model.config.num_hidden_layers)
    prefix = _layers_prefix(model)
    new_index = {old: new for new, old in enumerate(layers)}
    names = {}
    for name in model.state_dict():
        if not name.startswith(prefix):
            names[name] = name
            continue
        index, _, rest = name.removeprefix(prefix).partition(".")
        if int(index) in new_index:
            names[f"{prefix}{new_index[int(index)]}.{rest}"] = name
    return names


def rebuild_with_layers(
    model: PreTrainedModel, layers: Sequence[int], weights: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """A model in fp32 with these layers of `model`, and these weights under their new names.

    Raises:
        ModelUnsupported: they are not the weights of such a model.
    """
    return _rebuild(model, _config_with_layers(model.config, layers), weights)


def with_dropout(model: PreTrainedModel, probability: float) -> PreTrainedModel:
    """The same weights, in fp32 and memory of their own, under a config whose dropouts all are `probability`."""
    config = deepcopy(model.config)
    for name, value in config.to_dict().items():
        # Each family has its own names: attention_dropout, resid_pdrop, ...
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float | int):
            setattr(config, name, probability)
    return _rebuild(model, config, model.state_dict())


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of `model` in their order.

    Raises:
        ModelUnsupported: they cannot be told from its other parts.
    """
    return list(model.get_submodule(_layers_prefix(model).removesuffix(".")).children())


def _layers_prefix(model: PreTrainedModel) -> str:
    """`model.layers.` or the like: the outermost module list with one entry for each layer."""
    count = model.config.num_hidden_layers
    prefixes: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in prefixes)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            prefixes.append(name)
    if len(prefixes) != 1:
        raise ModelUnsupported(f"The layers of a {model.config.model_type} model cannot be told from its other parts.")
    return f"{prefixes[0]}."


def _config_with_layers(original: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    config = deepcopy(original)
    before = config.num_hidden_layers
    # Set through the config, which knows the name that its family uses, such as n_layer.
    config.num_hidden_layers = len(layers)
    for name, value in original.to_dict().items():
        if name in _LAYER_INDICES and isinstance(value, list):
            setattr(config, name, [new for new, old in enumerate(layers) if old in value])
        elif name in _FIRST_LAYERS and isinstance(value, int):
            setattr(config, name, sum(old < value for old in layers))
        elif ("layer" in name or name in _PER_LAYER) and isinstance(value, list) and len(value) == before:
            setattr(config, name, [value[index] for index in layers])
    return config


def _rebuild(like: PreTrainedModel, config: PreTrainedConfig, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Build a model from its config rather than by editing modules, so that every layer knows its number and kind."""
    with no_init_weights():
        # The method carries no annotations in transformers.
        rebuilt: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Initialisation would tie weights, and it was left out.
    rebuilt.tie_weights()
    try:
        rebuilt.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise ModelUnsupported(f"A {config.model_type} model cannot be rebuilt from these weights.") from error
    rebuilt.generation_config = deepcopy(like.generation_config)
    return rebuilt
