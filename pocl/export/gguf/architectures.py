"""Which model families can be written as GGUF, and what a file says of their shape."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, PreTrainedConfig

from pocl.errors import GgufUnsupported
from pocl.inspect.family_support import GGUF_FAMILIES, explain_no_gguf
from pocl.models.model_files import loading_foreign


@dataclass(frozen=True)
class _Family:
    name: str
    """The architecture in llama.cpp."""
    rotates_pairs: bool
    """Whether llama.cpp rotates neighbouring elements of a head, where transformers rotates its two halves: the rows of
    queries and keys must be put in its order."""
    biases: frozenset[str]
    """The projections whose bias llama.cpp reads."""


_OF_ATTENTION: Final = frozenset({"q_proj", "k_proj", "v_proj"})
_OF_LLAMA: Final = _OF_ATTENTION | {"o_proj", "gate_proj", "up_proj", "down_proj"}
_FAMILIES: Final[Mapping[str, _Family]] = {
    "llama": _Family("llama", True, _OF_LLAMA),
    "mistral": _Family("llama", True, _OF_LLAMA),
    "qwen2": _Family("qwen2", False, _OF_ATTENTION),
    "qwen3": _Family("qwen3", False, frozenset()),
}
assert _FAMILIES.keys() == GGUF_FAMILIES
_ACTIVATIONS: Final = frozenset({"silu", "swish"})
_YARN_DEFAULTS: Final = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "truncate": True}


@dataclass(frozen=True)
class Architecture:
    """The shape of a model, in the terms of llama.cpp."""

    name: str
    layers: int
    hidden_size: int
    inner_size: int
    heads: int
    key_value_heads: int
    head_size: int
    context_length: int
    """The most tokens that it reads as transformers does."""
    vocabulary_size: int
    """The rows of the embeddings."""
    norm_epsilon: float
    rope_base: float
    rotates_pairs: bool
    biases: frozenset[str]
    tied_embeddings: bool
    rope_scaling: Mapping[str, float | int | str] = field(default_factory=dict)
    """`type` (`linear` or `yarn`), `factor` and, of YaRN, `original_context_length`; empty where none is written."""
    rope_divisors: tuple[float, ...] = ()
    """By what each frequency of the rotary embeddings is divided, `head_size / 2` of them; empty where by nothing."""
    notes: tuple[str, ...] = ()


def architecture_of(directory: Path) -> Architecture:
    """The shape of the model of a directory.

    Raises:
        GgufUnsupported: the family is none of :data:`GGUF_FAMILIES`, or its config asks for what llama.cpp lacks.
        ModelUnsupported: the config cannot be read.
    """
    with loading_foreign(directory, "The model"):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if (reason := explain_no_gguf(config.model_type)) is not None:
        raise GgufUnsupported(reason)
    family = _FAMILIES[config.model_type]
    if config.hidden_act not in _ACTIVATIONS:
        raise GgufUnsupported(f"llama.cpp has no activation {str(config.hidden_act)[:40]!r} for this family.")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context_length, notes = _context_length(config)
    scaling, divisors = _scaling(config, head_size)
    return Architecture(
        name=family.name,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        inner_size=config.intermediate_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_size=head_size,
        context_length=context_length,
        vocabulary_size=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        rope_base=float(config.rope_parameters["rope_theta"]),
        rotates_pairs=family.rotates_pairs,
        biases=family.biases,
        tied_embeddings=bool(config.tie_word_embeddings),
        rope_scaling=scaling,
        rope_divisors=divisors,
        notes=notes,
    )


def _context_length(config: PreTrainedConfig) -> tuple[int, tuple[str, ...]]:
    positions, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) and isinstance(window, int) and 0 < window < positions:
        note = (
            f"The context is {window} tokens and not {positions}: beyond {window} the model attends to a window, which "
            "llama.cpp does not do for this family."
        )
        return window, (note,)
    return positions, ()


def _scaling(config: PreTrainedConfig, head_size: int) -> tuple[dict[str, float | int | str], tuple[float, ...]]:
    rope: Mapping[str, Any] = config.rope_parameters
    if rope.get("partial_rotary_factor", 1) != 1:
        raise GgufUnsupported("llama.cpp rotates whole heads in this family, and the model a part of each.")
    match rope.get("rope_type", "default"):
        case "default":
            return {}, ()
        case "linear":
            return {"type": "linear", "factor": float(rope["factor"])}, ()
        case "llama3":
            return {}, _llama3_divisors(rope, head_size)
        case "yarn" if all(rope.get(name, value) in (value, None) for name, value in _YARN_DEFAULTS.items()):
            original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            length = {"original_context_length": int(original)}
            return {"type": "yarn", "factor": float(rope["factor"]), **length}, ()
        case kind:
            raise GgufUnsupported(f"Rotary embeddings of kind {str(kind)[:40]!r} cannot be written as GGUF here.")


def _llama3_divisors(rope: Mapping[str, Any], head_size: int) -> tuple[float, ...]:
    """By what Llama 3.1 divides each frequency f = base^(-2i/d): 1 for wavelengths 2 pi / f below `original / high`,
    `factor` above `original / low`, and between them the inverse of (1 - s) / factor + s, with s the position between
    both (https://github.com/meta-llama/llama-models, `apply_scaling`).
    """
    base, factor = float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    divisors = []
    for index in range(head_size // 2):
        wavelength = 2 * math.pi * base ** (2 * index / head_size)
        position = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        divisors.append(1 / ((1 - position) / factor + position))
    return tuple(divisors)
