"""What has been tried of each family of causal language models: tests/pocl/test_families.py holds this table.

A family that is in neither table is tried when a run loads it (:mod:`pocl.models.family_trial`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pocl.errors import FieldError, ModelUnsupported, SpecInvalid

Packing = Literal["packed", "within its window", "padded"]
Decoding = Literal["continuous", "padded", "single", "uncached"]


@dataclass(frozen=True)
class FamilySupport:
    """How samples of a family are trained and answered; each way gives the numbers of plain transformers."""

    packing: Packing = "packed"
    """Whether samples lie one behind the other in a batch; `within its window`: where none is longer than that."""
    decoding: Decoding = "continuous"
    """How answers are generated, from the fastest on; a window that is shorter than a text makes `continuous` `padded`.
    `single`: one by one. `uncached`: the text is read again at each token."""
    layers: bool = True
    """Whether a student can be cut out of a teacher: its layers do not depend on their number or on each other."""


_FULL = FamilySupport()
_WINDOW = FamilySupport("within its window")
_PADDED = FamilySupport("padded", "padded")
_PADDED_WHOLE = FamilySupport("padded", "padded", layers=False)

FAMILIES: Final[Mapping[str, FamilySupport]] = {
    "afmoe": _WINDOW,
    "apertus": _FULL,
    "arcee": _FULL,
    "bamba": _PADDED,
    "biogpt": _FULL,
    "bitnet": _FULL,
    "bloom": _PADDED,
    "codegen": _PADDED,
    "cohere": _FULL,
    "cohere2": _WINDOW,
    "ctrl": _FULL,
    "cwm": _WINDOW,
    "dbrx": _FULL,
    "deepseek_v2": _FULL,
    "deepseek_v3": _FULL,
    "diffllama": FamilySupport(layers=False),
    "doge": _PADDED,
    "dots1": _FULL,
    "ernie4_5": _FULL,
    "ernie4_5_moe": _FULL,
    "exaone4": _WINDOW,
    "exaone_moe": _WINDOW,
    "falcon": _PADDED,
    "falcon_h1": _PADDED,
    "falcon_mamba": _PADDED,
    "flex_olmo": _FULL,
    "gemma": _FULL,
    "gemma2": _PADDED,
    "gemma3_text": _WINDOW,
    "gemma3n_text": FamilySupport("within its window", layers=False),
    "glm": _FULL,
    "glm4": _FULL,
    "glm4_moe": _FULL,
    "gpt2": _FULL,
    "gpt_bigcode": _FULL,
    "gpt_neo": _PADDED,
    "gpt_neox": _FULL,
    "gpt_oss": _PADDED,
    "gptj": _PADDED,
    "granite": _FULL,
    "granitemoe": _FULL,
    "granitemoehybrid": _PADDED,
    "granitemoeshared": _FULL,
    "helium": _FULL,
    "hunyuan_v1_dense": _FULL,
    "hunyuan_v1_moe": _FULL,
    "hyperclovax": _FULL,
    "internlm3": _FULL,
    "jais2": _FULL,
    "jamba": _PADDED_WHOLE,
    "jetmoe": _FULL,
    "lfm2": _PADDED,
    "lfm2_moe": _PADDED,
    "llama": _FULL,
    "llama4_text": _WINDOW,
    "mamba": _PADDED,
    "mamba2": _PADDED,
    "minicpm3": FamilySupport(layers=False),
    "minimax": FamilySupport("padded", "uncached"),
    "minimax_m2": _FULL,
    "ministral": _WINDOW,
    "ministral3": _WINDOW,
    "mistral": _WINDOW,
    "mixtral": _WINDOW,
    "mpt": _PADDED,
    "nanochat": _FULL,
    "nemotron": _FULL,
    "nemotron_h": _PADDED,
    "olmo": _FULL,
    "olmo2": _FULL,
    "olmo3": _WINDOW,
    "olmoe": _FULL,
    "openai-gpt": FamilySupport("padded", "uncached"),
    "opt": _FULL,
    "persimmon": _FULL,
    "phi": _FULL,
    "phi3": _WINDOW,
    "phimoe": _WINDOW,
    "qwen2": _WINDOW,
    "qwen2_moe": _WINDOW,
    "qwen3": _WINDOW,
    "qwen3_5_text": _PADDED,
    "qwen3_moe": _WINDOW,
    "qwen3_next": _PADDED,
    "recurrent_gemma": FamilySupport("padded", "single", layers=False),
    "rwkv": FamilySupport("padded", "uncached", layers=False),
    "seed_oss": _FULL,
    "smollm3": _WINDOW,
    "stablelm": _FULL,
    "starcoder2": _WINDOW,
    "vaultgemma": _PADDED,
    "xglm": _PADDED,
    "xlstm": FamilySupport("padded", "uncached", layers=False),
    "zamba2": _PADDED_WHOLE,
}

_GGUF_ARCHITECTURES = frozenset({"gemma3", "qwen2moe", "qwen3moe", "qwen35", "qwen35moe"})
"""Architectures of GGUF files whose layers can be taken out, under names other than the `model_type`."""

_BOTH_SIDES = "attends to both sides of a token"
_POSITIONS = "numbers its positions in a way of its own"
_HALF = "is half of an encoder-decoder"
REFUSED_FAMILIES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("xlnet", "xlm", "cpmant"), _BOTH_SIDES),
    **dict.fromkeys(
        (
            "bert", "bert-generation", "big_bird", "electra", "ernie", "megatron-bert", "rembert", "roc_bert",
            "roformer",
        ),
        _BOTH_SIDES,
    ),
    **dict.fromkeys(
        (
            "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
        ),
        _POSITIONS,
    ),
    **dict.fromkeys(
        (
            "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
            "prophetnet", "trocr", "whisper",
        ),
        _HALF,
    ),
    "modernbert-decoder": "applies its output head in a way of its own",
    "reformer": "hashes its tokens into buckets at random",
}  # fmt: skip
"""Families that transformers builds as causal language models, and why they are not distilled."""


def check_family(family: str) -> None:
    """Refuse a family that cannot be distilled; `family` is the `model_type` of its config.

    Raises:
        ModelUnsupported: naming it and the reason.
    """
    reason = REFUSED_FAMILIES.get(family)
    if reason is not None:
        raise ModelUnsupported(f"A {family} model {reason}; only causal decoders can be distilled.")


GGUF_FAMILIES: Final = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Families of which a student can be written as GGUF."""


def explain_no_gguf(family: str) -> str | None:
    """Why no model of a family, its `model_type`, can be written as GGUF, in one sentence; None where one can."""
    if family in GGUF_FAMILIES:
        return None
    known = ", ".join(sorted(GGUF_FAMILIES))
    return f"Models of the family {family[:80]!r} cannot be written as GGUF here: {known} can."


def check_gguf_family(family: str) -> None:
    """Refuse to write a student of a family as GGUF; `family` is a `model_type`, or the architecture of a GGUF file.

    Raises:
        SpecInvalid: naming the families that can be written.
    """
    if family not in GGUF_FAMILIES:
        detail = f"a {family[:40]} student cannot be written as GGUF: {', '.join(sorted(GGUF_FAMILIES))} can"
        raise SpecInvalid([FieldError("/export/gguf", "gguf_unsupported", detail)])


def is_tried(family: str) -> bool:
    """Whether a family was tried; `family` is a `model_type`, or the architecture of a GGUF file."""
    return family in FAMILIES or family in _GGUF_ARCHITECTURES


def explain_unselectable_layers(family: str) -> str | None:
    """Why no student can be cut out of a teacher of this family, as a clause; None where one can."""
    support = FAMILIES.get(family)
    if support is None:
        return None if family in _GGUF_ARCHITECTURES else "it has not been tried with this family"
    return None if support.layers else "its layers depend on their number or on each other"


def check_layers_selectable(family: str) -> None:
    """Refuse to cut a student out of a teacher whose layers do something else under another number, or of whose layers
    that is not known; `family` is a `model_type`, or the architecture of a GGUF file.

    Raises:
        SpecInvalid: naming the family and what to do.
    """
    reason = explain_unselectable_layers(family)
    if reason is not None:
        detail = f"no student can be cut out of a {family[:40]} teacher: {reason}; give a student of its own"
        raise SpecInvalid([FieldError("/student/from_teacher", "layers_not_selectable", detail)])
