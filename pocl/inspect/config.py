"""config.json of a model, as transformers reads it: its family, its entries, and whether it can be distilled."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from pocl.errors import ModelUnsupported
from pocl.inspect.config_values import normalised_entries
from pocl.inspect.facts import MAX_LAYERS, ModelWarning
from pocl.inspect.families import family_table
from pocl.inspect.formats import refuse_adapter
from pocl.inspect.quantisation import quantisation_method
from pocl.inspect.reading import JsonObject, bounded_int, read_object
from pocl.inspect.rope import check_rope, normalised_rope

_CONFIG_LIMIT = 4 << 20
_SIZE_LIMIT = 1 << 24
_MAX_MTP_LAYERS = 64
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k")
_MTP_ENTRIES = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")
_SAME_FOR_TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text models that AutoModelForCausalLM does not build, and families that compute the same of text alone: their rotary
positions differ only where images stand."""
_TEXT_FAMILIES = frozenset(
    {
        "gemma", "gemma3_text", "llama", "llama4_text", "ministral3", "mistral", "qwen2", "qwen3", "qwen3_5_text",
        "smollm3",
    }
)  # fmt: skip
"""Text models that give the same logits alone as within the whole, which leaves out what follows the output head of
others, such as the scale of Cohere 2 or the cap of Gemma 2."""
_PASSED_TO_TEXT = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
"""Entries of a model of several modalities that hold for its text model where that has none of its own."""


@dataclass(frozen=True)
class ModelConfig:
    """A config of a causal language model that can be distilled."""

    entries: JsonObject
    """What transformers is given: in types that it takes; of a model of several modalities its text model's alone."""
    family: str
    """`model_type` of `entries`."""
    whole_family: str | None
    """`model_type` of the model of several modalities whose text model this is; None where it is the whole."""
    quantised_by: str | None
    """The method by which the weights are quantised, which are made full as they are read; None for full weights."""
    warnings: tuple[ModelWarning, ...]

    def size(self, name: str) -> int:
        """A size under the name that most families have for it.

        Raises:
            ModelUnsupported: the config has none that can be used.
        """
        size = self.optional_size(name)
        if size is None:
            raise ModelUnsupported(f"The model's config.json has no usable {name}.")
        return size

    def optional_size(self, name: str) -> int | None:
        """As :meth:`size`; None where there is none."""
        named = [other for other in family_table().size_names(self.family, name) if self.entries.get(other) is not None]
        if named:
            return bounded_int(self.entries[named[0]], at_most=_SIZE_LIMIT) or None
        kinds = self.entries.get("layers_block_type")
        if name == "num_hidden_layers" and isinstance(kinds, list):
            # Nemotron-H is saved with the kinds of its layers alone.
            return len(kinds) or None
        return family_table().default_size(self.family, name)

    def mtp_layers(self) -> int:
        """The layers for multi-token prediction, which lie behind the others and are not loaded."""
        return max(bounded_int(self.entries.get(name), at_most=_MAX_MTP_LAYERS) or 0 for name in _MTP_ENTRIES)

    @property
    def experts(self) -> int | None:
        """The routed experts of a layer; None where there are none, or the config does not say."""
        return self._first_size(_EXPERTS)

    @property
    def experts_per_token(self) -> int | None:
        """The routed experts of a layer that a token is given to; None likewise."""
        return self._first_size(_EXPERTS_PER_TOKEN)

    def _first_size(self, names: Iterable[str]) -> int | None:
        sizes = (bounded_int(self.entries.get(name), at_most=_SIZE_LIMIT) for name in names)
        return next((size for size in sizes if size), None)

    def ties_embeddings(self) -> bool:
        """Whether the output head is the embedding."""
        tied = self.entries.get("tie_word_embeddings")
        return tied if isinstance(tied, bool) else self.family in family_table().tied


def read_config(directory: Path) -> ModelConfig:
    """Read config.json of a model that can be distilled; its weights need not be there.

    Raises:
        ModelUnsupported: it is an adapter, no causal language model, of a family that transformers does not build,
            quantised by a method that cannot be undone, needs code of its own, or an entry cannot be used.
        OSError: a file cannot be read.
    """
    refuse_adapter(directory)
    return parse_config(read_object(directory / "config.json", limit=_CONFIG_LIMIT))


def parse_config(content: JsonObject) -> ModelConfig:
    """The config of a model out of the content of its config.json.

    Raises:
        ModelUnsupported: as :func:`read_config`.
    """
    family = _named_family(content)
    _check_architecture(content)
    quantised_by = quantisation_method(content)
    entries, text_family = _text_part(content, family)
    warnings = [*_own_code_warning(content, text_family or family)]
    if text_family is not None:
        if quantised_by is not None:
            raise ModelUnsupported(
                f"The model is quantised by {quantised_by!r} and of several modalities; give its full weights."
            )
        message = f"only the text part of the {family} model is loaded and saved, as a {text_family} model"
        warnings.append(ModelWarning("text_part_only", message))
    family = text_family or family
    _check_family(family)
    entries = _without_outer_padding(normalised_rope(normalised_entries(entries, family)))
    if family in family_table().decoders and entries.get("is_decoder") is not True:
        raise ModelUnsupported(f"A {family} model attends to both sides; only causal language models can be distilled.")
    config = ModelConfig(
        entries={**entries, "model_type": family},
        family=family,
        whole_family=None if text_family is None else _named_family(content),
        quantised_by=quantised_by,
        warnings=tuple(warnings),
    )
    _check_sizes(config)
    if quantised_by is not None:
        message = f"the weights are quantised by {quantised_by}: they are made full as they are read, and saved in full"
        warnings.append(ModelWarning("dequantised", message))
    return ModelConfig(config.entries, config.family, config.whole_family, quantised_by, tuple(warnings))


def _named_family(content: JsonObject) -> str:
    family = content.get("model_type")
    if not isinstance(family, str) or not re.fullmatch(r"[\w.-]{1,64}", family):
        raise ModelUnsupported("The model's config.json names no model_type.")
    if family == "mistral" and content.get("layer_types"):
        # As transformers reads it: Mistral with windows in some of its layers.
        return "ministral"
    return family


def _check_architecture(content: JsonObject) -> None:
    if content.get("is_encoder_decoder"):
        raise ModelUnsupported("The model is an encoder-decoder; only causal language models can be distilled.")
    architectures = content.get("architectures") or []
    if not isinstance(architectures, list):
        raise ModelUnsupported("The model's config.json has architectures that are no list.")
    if architectures and not any(_is_causal(name) for name in architectures):
        name = repr(architectures[0])[:80] if isinstance(architectures[0], str) else "What config.json names"
        raise ModelUnsupported(f"{name} is not a causal language model.")


def _is_causal(architecture: JsonValue) -> bool:
    return isinstance(architecture, str) and architecture.endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    )


def _own_code_warning(content: JsonObject, family: str) -> list[ModelWarning]:
    """Own code is never run: it is passed over where it is the published form of a class that transformers ships.

    Raises:
        ModelUnsupported: the code has another class.
    """
    own = content.get("auto_map")
    if not own:
        return []
    model = own.get("AutoModelForCausalLM") if isinstance(own, dict) else None
    expected = family_table().classes.get(family)
    if expected is None or not isinstance(model, str) or model.rsplit(".", 1)[-1] != expected:
        raise ModelUnsupported(
            "The model needs code of its own (auto_map), which is never run; use an architecture that "
            "transformers ships."
        )
    message = (
        f"the model brings code of its own (auto_map), which is not run: {expected} of transformers takes its place"
    )
    return [ModelWarning("own_code_not_run", message)]


def _text_part(content: JsonObject, family: str) -> tuple[JsonObject, str | None]:
    """The entries of the model, or of the text model of a model of several modalities with its family.

    Raises:
        ModelUnsupported: the text model cannot be loaded alone.
    """
    table = family_table()
    text = content.get("text_config") or content.get("llm_config") or content.get("language_config")
    if family not in table.text_parts or (family in table.classes and not isinstance(text, dict)):
        return content, None
    if not isinstance(text, dict):
        # Before there was a text_config, its entries stood beside those of the vision model.
        text = {name: value for name, value in content.items() if not isinstance(value, dict) or "rope" in name}
        text.pop("model_type", None)
    named = text.get("model_type") or table.text_parts[family]
    text_family = _SAME_FOR_TEXT.get(str(named), str(named))
    builds = table.classes.get(text_family, "")
    if text_family not in _TEXT_FAMILIES or not builds.endswith("ForCausalLM"):
        raise ModelUnsupported(
            f"A {family} model is of several modalities, and its text model ({text_family[:40]}) cannot be loaded "
            "alone; give a text model."
        )
    passed = {name: content[name] for name in _PASSED_TO_TEXT if name in content and text.get(name) is None}
    entries: JsonObject = {**passed, **text, "architectures": [builds]}
    if isinstance(content.get("tie_word_embeddings"), bool):
        # The head belongs to the whole, which says whether it is tied.
        entries["tie_word_embeddings"] = content["tie_word_embeddings"]
    if named in _SAME_FOR_TEXT:
        entries = _without_image_positions(entries)
    return entries, text_family


def _without_image_positions(entries: JsonObject) -> JsonObject:
    """Rotary embeddings without the sections of images: of text alone all sections have the same positions."""
    dropped = {"mrope_section", "mrope_interleaved"}
    result = dict(entries)
    for name in ("rope_scaling", "rope_parameters"):
        value = entries.get(name)
        if isinstance(value, dict):
            kept = {key: entry for key, entry in value.items() if key not in dropped and entry != "mrope"}
            result[name] = kept
    return result


def _without_outer_padding(entries: JsonObject) -> JsonObject:
    """The entries without a padding token that has no embedding: its row of the embeddings would be left untrained."""
    pad, vocabulary = entries.get("pad_token_id"), entries.get("vocab_size")
    if isinstance(pad, int) and isinstance(vocabulary, int) and not 0 <= pad < vocabulary:
        return {**entries, "pad_token_id": None}
    return entries


def _check_family(family: str) -> None:
    table = family_table()
    if family in table.classes:
        return
    if family in table.text_parts:
        raise ModelUnsupported(f"A {family} model has no text model that can be loaded alone; give a text model.")
    raise ModelUnsupported(
        f"The engine's transformers builds no causal language model of model_type {family!r}; use a family that it "
        "knows."
    )


def _check_sizes(config: ModelConfig) -> None:
    layers, hidden = config.size("num_hidden_layers"), config.size("hidden_size")
    config.size("vocab_size")
    if layers > MAX_LAYERS:
        raise ModelUnsupported(f"The model has more than {MAX_LAYERS} layers.")
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
        _check_size(config, name)
    _check_experts(config)
    if config.entries.get("per_layer_config"):
        raise ModelUnsupported(
            "The model's layers have configs of their own (per_layer_config), which are not read here."
        )
    heads, groups = config.optional_size("num_attention_heads"), config.optional_size("num_key_value_heads")
    if heads and hidden % heads and (config.family in family_table().divisible or not config.optional_size("head_dim")):
        raise ModelUnsupported(
            f"The model's config.json has a hidden_size of {hidden} that its {heads} attention heads do not divide."
        )
    if heads and groups and heads % groups:
        raise ModelUnsupported(
            f"The model's config.json has {heads} attention heads that its {groups} key-value heads do not divide."
        )
    head = config.optional_size("head_dim") or (hidden // heads if heads else 0)
    # Others rotate a part of a head that their configs name otherwise.
    if config.family in family_table().layers or config.family in ("phi3", "phimoe"):
        check_rope(config.entries, head)
    for name in ("layer_types", "mlp_layer_types"):
        _check_layer_types(name, config.entries.get(name), layers)
    types = config.entries.get("layer_types")
    if isinstance(types, list) and "sliding_attention" in types and config.entries.get("sliding_window", 0) is None:
        raise ModelUnsupported("The model's config.json has layers of sliding_attention and no sliding_window.")


def _check_experts(config: ModelConfig) -> None:
    """Check that a token is given to some of the experts that there are."""
    counts = [config.entries.get(name) for name in _EXPERTS]
    experts = next((count for count in counts if isinstance(count, int)), None)
    if experts == 0:
        # Dense models of families that may have experts.
        return
    for name in _EXPERTS_PER_TOKEN:
        chosen = config.entries.get(name)
        if isinstance(chosen, int) and (chosen < 0 or (experts is not None and not 1 <= chosen <= experts)):
            raise ModelUnsupported(
                f"The model's config.json has no usable {name}: {chosen}"
                f"{'' if experts is None else f' of {experts} experts'}."
            )


def _check_size(config: ModelConfig, name: str) -> None:
    for own in family_table().size_names(config.family, name):
        value = config.entries.get(own)
        # Some families give a list with a size for each layer.
        if value is not None and not isinstance(value, list) and not bounded_int(value, at_most=_SIZE_LIMIT):
            raise ModelUnsupported(f"The model's config.json has no usable {own}: {str(value)[:40]}.")


def _check_layer_types(name: str, types: JsonValue, layers: int) -> None:
    if types is None:
        return
    if not isinstance(types, list) or len(types) != layers:
        raise ModelUnsupported(
            f"The model's config.json has {name} that do not name one type for each of its {layers} layers."
        )
    for layer_type in types:
        if layer_type not in family_table().layer_types:
            raise ModelUnsupported(
                f"The model's config.json has {name} with {str(layer_type)[:40]!r}, which is not known."
            )
