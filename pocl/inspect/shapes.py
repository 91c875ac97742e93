"""Whether stored tensors have the shapes that config.json describes."""

import re
from collections.abc import Mapping

from pocl.errors import ModelUnsupported
from pocl.inspect.config import ModelConfig
from pocl.inspect.families import family_table
from pocl.inspect.weights import StoredModel, StoredTensor, is_mtp, name_within_layer

_EXPERT = re.compile(r"\.experts\.(\d{1,5})\.")
_ADVICE = "give the config.json with which the weights were saved"


def check_shapes(config: ModelConfig, stored: StoredModel) -> bool:
    """Check the embeddings, the head and, of families whose layers are all alike, every weight of a layer; and say
    whether the family is one of those.

    Raises:
        ModelUnsupported: naming a tensor that is missing or has another shape.
    """
    _check_vocabulary(config, stored)
    if not stored.is_quantised:
        _check_experts(stored)
    expected = family_table().layers.get(config.family)
    # Quantised weights are packed, and their shapes follow from the method.
    if expected is None or stored.is_quantised:
        return False
    for entry, added in family_table().biases[config.family].items():
        if config.entries.get(entry, entry in family_table().true_by_default[config.family]) is True:
            expected = {**expected, **added}
    _check_layers(config, stored, expected)
    _check_outside(config, stored)
    return True


def weights_outside(config: ModelConfig, stored: StoredModel) -> list[str]:
    """Of a family whose layers are all alike: the weights that are neither its layers' nor among those beside them."""
    known = {"embed_tokens.weight", "lm_head.weight", *family_table().outside[config.family]}
    return [
        tensor.name
        for tensor in stored.tensors
        if name_within_layer(tensor.name) is None and tensor.name.removeprefix("model.") not in known
    ]


def _check_vocabulary(config: ModelConfig, stored: StoredModel) -> None:
    vocabulary = config.size("vocab_size")
    for tensor, what in ((stored.embeddings(), "token embeddings"), (stored.head(), "output head")):
        # This family has more rows for prompts.
        if tensor is not None and tensor.shape[0] != vocabulary and config.family != "cpmant":
            raise ModelUnsupported(
                f"The rows of the model's {what} ({tensor.name[:80]}) are {tensor.shape[0]}, and its config.json has a "
                f"vocab_size of {vocabulary}; {_ADVICE}."
            )
    family_is_known = config.family in family_table().layers
    embeddings = stored.embeddings()
    if family_is_known and (embeddings is None or embeddings.name.removeprefix("model.") != "embed_tokens.weight"):
        raise ModelUnsupported(_explain_names(stored))
    head = stored.head()
    if family_is_known and head is not None and head.shape != (vocabulary, config.size("hidden_size")):
        raise ModelUnsupported(
            f"The model's output head ({head.name[:80]}) has the shape {list(head.shape)}, and its config.json "
            f"describes {[vocabulary, config.size('hidden_size')]}; {_ADVICE}."
        )
    if family_is_known and head is None and not config.ties_embeddings():
        raise ModelUnsupported(
            "The model's weights lack the output head (lm_head.weight), which its config.json does not tie to the "
            "embeddings; save the model with its head, or set tie_word_embeddings to true where it is tied."
        )


def _explain_names(stored: StoredModel) -> str:
    name = stored.tensors[0].name[:80] if stored.tensors else "none"
    return (
        f"The model's weights lack the token embeddings (model.embed_tokens.weight); the first name in its files is "
        f"{name}: where a wrapper put a prefix before the names, save the model within it with save_pretrained()."
    )


def _check_experts(stored: StoredModel) -> None:
    """Check that a layer has every weight of each of its experts, which are stored one by one, all of one shape."""
    groups: dict[tuple[str, str], dict[int, StoredTensor]] = {}
    for tensor in stored.tensors:
        if match := _EXPERT.search(tensor.name):
            groups.setdefault((tensor.name[: match.start()], tensor.name[match.end() :]), {})[int(match[1])] = tensor
    counts: dict[str, int] = {}
    for (layer, _), experts in groups.items():
        counts[layer] = max(counts.get(layer, 0), 1 + max(experts))
    for (layer, name), experts in groups.items():
        lost = next((number for number in range(counts[layer]) if number not in experts), None)
        if lost is not None:
            raise ModelUnsupported(
                f"The model's weights lack {layer[:80]}.experts.{lost}.{name[:40]}; save the whole model with "
                "save_pretrained()."
            )
        first = experts[0]
        for tensor in experts.values():
            if tensor.shape != first.shape:
                raise ModelUnsupported(
                    f"The model's {tensor.name[:80]} has the shape {list(tensor.shape)}, and {first.name[:80]} "
                    f"{list(first.shape)}; save the whole model with save_pretrained()."
                )


def _check_layers(config: ModelConfig, stored: StoredModel, expected: Mapping[str, str]) -> None:
    layers, sizes = config.size("num_hidden_layers"), _sizes(config)
    found: dict[int, dict[str, StoredTensor]] = {index: {} for index in range(layers)}
    for tensor in stored.tensors:
        place = name_within_layer(tensor.name)
        if place is not None and not is_mtp(tensor.name, layers):
            found[place[0]][place[1]] = tensor
            if place[1] not in expected:
                raise ModelUnsupported(
                    f"The model's weights have {tensor.name[:80]}, which its config.json does not describe; {_ADVICE}."
                )
    for name, words in expected.items():
        shape = tuple(sizes[word] for word in words.split(","))
        for index, weights in found.items():
            weight = weights.get(name)
            if weight is None:
                raise ModelUnsupported(
                    f"The model's weights lack {name} of layer {index}; save the whole model with save_pretrained()."
                )
            if None not in shape and weight.shape != shape:
                raise ModelUnsupported(
                    f"The model's {weight.name[:80]} has the shape {list(weight.shape)}, and its config.json describes "
                    f"{list(shape)}; {_ADVICE}."
                )


def _check_outside(config: ModelConfig, stored: StoredModel) -> None:
    """Check the weights that are neither in a layer nor embeddings or head, such as the last norm."""
    found = {tensor.name.removeprefix("model."): tensor for tensor in stored.tensors}
    hidden = config.size("hidden_size")
    for name in family_table().outside[config.family]:
        if name not in found:
            raise ModelUnsupported(f"The model's weights lack {name}; save the whole model with save_pretrained().")
        if found[name].shape != (hidden,):
            raise ModelUnsupported(
                f"The model's {found[name].name[:80]} has the shape {list(found[name].shape)}, and its config.json "
                f"describes {[hidden]}; {_ADVICE}."
            )


def _sizes(config: ModelConfig) -> dict[str, int | None]:
    """The sizes of a layer by their words; None where the config does not say."""
    hidden, heads = config.size("hidden_size"), config.optional_size("num_attention_heads")
    groups = config.optional_size("num_key_value_heads") or heads
    head = config.optional_size("head_dim") or (hidden // heads if heads else None)
    return {
        "hidden": hidden,
        "inter": config.optional_size("intermediate_size"),
        "q": heads * head if heads and head else None,
        "kv": groups * head if groups and head else None,
        "head": head,
        "heads": heads,
        "groups": groups,
    }
