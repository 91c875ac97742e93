"""What the engine's transformers can build: a table that `python -m tools.causal_models` writes.

The table stands in the package because the service has no transformers; a test compares it with the installed one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files

_COMMON_NAMES = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
}
"""Families name the same size differently, and older files use another family's name."""


@dataclass(frozen=True)
class FamilyTable:
    """Families of causal language models by `model_type`, as transformers knows them."""

    classes: Mapping[str, str]
    """The class that AutoModelForCausalLM builds."""
    text_parts: Mapping[str, str]
    """`model_type` of a model of several modalities -> that of its text model where its config names none."""
    fields: Mapping[str, Mapping[str, str]] = field(repr=False)
    """Entry of a config -> the types of JSON that it takes: i, f, b, s (text), n (null), l (list), o (object)."""
    sizes: Mapping[str, Mapping[str, str]] = field(repr=False)
    """Common name of an entry -> the family's own."""
    defaults: Mapping[str, Mapping[str, int]] = field(repr=False)
    """Sizes that a config may leave out, under the family's own names."""
    layers: Mapping[str, Mapping[str, str]] = field(repr=False)
    """Of families whose layers are all alike: name of a weight within a layer -> its shape in words (hidden, inter, q,
    kv, head, heads, groups), joined by commas."""
    biases: Mapping[str, Mapping[str, Mapping[str, str]]] = field(repr=False)
    """Of the same families: entry of a config -> the weights that it adds to a layer where it is true."""
    outside: Mapping[str, Sequence[str]] = field(repr=False)
    """Of the same families: the weights outside of layers, embeddings and head, each of the hidden size."""
    true_by_default: Mapping[str, Sequence[str]] = field(repr=False)
    """Those of these entries that hold where a config leaves them out."""
    decoders: frozenset[str]
    """Families that are decoders only where their config says so."""
    divisible: frozenset[str]
    """Families whose hidden size must be a multiple of their attention heads."""
    tied: frozenset[str]
    """Families whose output head is the embedding unless a config says otherwise."""
    activations: frozenset[str]
    layer_types: frozenset[str]

    def size_names(self, family: str, name: str) -> tuple[str, ...]:
        """The names under which configs of a family give a size, its own first."""
        own = self.sizes.get(family, {}).get(name, name)
        return (own, *(other for other in _COMMON_NAMES.get(name, (name,)) if other != own))

    def types(self, family: str, name: str) -> str:
        """The types of JSON that an entry takes, as letters; none where any is taken.

        Models read entries of other families too where they are there, such as `head_dim`.
        """
        return self.fields.get(family, {}).get(name) or self._types_of_all.get(name, "")

    @cached_property
    def _types_of_all(self) -> Mapping[str, str]:
        found: dict[str, set[str]] = {}
        for fields in self.fields.values():
            for name, letters in fields.items():
                found.setdefault(name, set()).update(letters)
        return {name: "".join(sorted({*letters, "n"})) for name, letters in found.items()}

    def default_size(self, family: str, name: str) -> int | None:
        """The size of a model whose config leaves it out; None where the family has no default."""
        return self.defaults.get(family, {}).get(self.sizes.get(family, {}).get(name, name))


@cache
def family_table() -> FamilyTable:
    """The table, read once."""
    content = json.loads((files("pocl.inspect") / "causal_models.json").read_text())
    return FamilyTable(
        classes=content["classes"],
        text_parts=content["text_parts"],
        fields=content["fields"],
        sizes=content["sizes"],
        defaults=content["defaults"],
        layers=content["layers"],
        biases=content["biases"],
        outside=content["outside"],
        true_by_default=content["true_by_default"],
        decoders=frozenset(content["decoders"]),
        divisible=frozenset(content["divisible"]),
        tied=frozenset(content["tied"]),
        activations=frozenset(content["activations"]),
        layer_types=frozenset(content["layer_types"]),
    )
