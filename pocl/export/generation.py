"""The generation config that leaves with a student: plain `generate()` stops where the student was taught to stop."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pocl.evaluation.generate import model_stop_token_ids
from pocl.models.heads import head_vocabulary_size

_PAD_TOKENS: Final = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<pad_token>")
"""Names under which vocabularies have a token that pads and nothing else."""

MAX_NEW_TOKENS: Final = 32768
"""The most tokens of an answer that ends by none: no longer sample is trained on."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_SAMPLING: Final[dict[str, Callable[[Any], bool]]] = {
    "temperature": lambda value: _is_number(value) and value > 0,
    "top_k": lambda value: isinstance(value, int) and value >= 0,
    "top_p": lambda value: _is_number(value) and 0 < value <= 1,
    "min_p": lambda value: _is_number(value) and 0 <= value <= 1,
    "typical_p": lambda value: _is_number(value) and 0 < value <= 1,
    "epsilon_cutoff": lambda value: _is_number(value) and 0 <= value < 1,
    "eta_cutoff": lambda value: _is_number(value) and 0 <= value < 1,
}
"""Settings that mean something where answers are sampled, and which of their values `generate` takes."""
_ALWAYS: Final[dict[str, Callable[[Any], bool]]] = {
    "repetition_penalty": lambda value: _is_number(value) and value > 0,
    "no_repeat_ngram_size": lambda value: isinstance(value, int) and value >= 0,
}
"""Settings that mean something for greedy answers too."""
_REPLACED: Final = {
    "eos_token_id", "bos_token_id", "pad_token_id", "max_length", "max_new_tokens", "do_sample", "transformers_version",
}  # fmt: skip
"""Settings of which the exported config has a value of its own."""


@dataclass(frozen=True)
class ExportedGeneration:
    """The generation config of an exported directory, and what of the student's own has no place in it."""

    config: GenerationConfig
    left_out: tuple[str, ...]
    """Settings of the student's own generation config that the exported one lacks, in the order of their names."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens at which an answer ends."""
        eos = self.config.eos_token_id
        return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)

    @property
    def pad_token_id(self) -> int | None:
        """The token that pads; None where the vocabulary has none for it."""
        pad: int | None = self.config.pad_token_id
        return pad


def exported_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, end_ids: Sequence[int] = (), stop_text: str = ""
) -> ExportedGeneration:
    """The generation config of `model` with every token that ends an answer.

    Kept are sampling settings where answers are sampled and their values are ones that `generate` takes, and penalties.
    Left out is what would keep an answer from ending (`min_length`, `suppress_tokens`, ...), or fits the machine of the
    model's authors alone. `max_new_tokens` is half of what the model's own `max_length` or its positions allow: without
    a limit `generate` ends each answer at 20 tokens, and with `max_length` it warns whoever gives `max_new_tokens`.

    Args:
        end_ids: The tokens that end an answer in the template that the student was taught with. The end-of-sequence
            tokens of model and tokenizer follow them.
        stop_text: The plain text that ends an answer in that template, where no token does. `generate` stops there when
            it is given the tokenizer, and raises without, so that no answer runs on unnoticed.
    """
    vocabulary = head_vocabulary_size(model)
    own = model.generation_config or GenerationConfig()
    ends = _distinct_ids((*end_ids, *sorted(model_stop_token_ids(model, tokenizer))), vocabulary)
    given = {name: value for name, value in own.to_diff_dict().items() if value is not None}
    is_sampled = given.get("do_sample") is True
    settings = _ALWAYS | (_SAMPLING if is_sampled else {})
    kept = {name: given[name] for name, is_valid in settings.items() if name in given and is_valid(given[name])}
    begin = own.bos_token_id
    config = GenerationConfig(
        **kept,
        **({"do_sample": True} if is_sampled else {}),
        bos_token_id=begin if isinstance(begin, int) and 0 <= begin < vocabulary else None,
        eos_token_id=ends if len(ends) > 1 else ends[0] if ends else None,
        pad_token_id=_pad_id(model, tokenizer, ends, taught=set(end_ids), vocabulary=vocabulary),
        max_new_tokens=_max_new_tokens(model, own),
        **({"stop_strings": [stop_text]} if stop_text else {}),
    )
    replaced = _REPLACED | ({"stop_strings"} if stop_text else set())
    left_out = (name for name in given if not name.startswith("_") and name not in kept and name not in replaced)
    return ExportedGeneration(config, tuple(sorted(left_out)))


def _distinct_ids(ids: Iterable[Any], vocabulary: int) -> list[int]:
    """Those of `ids` that the output head scores, each once, in their order."""
    return list(dict.fromkeys(int(id_) for id_ in ids if isinstance(id_, int) and 0 <= id_ < vocabulary))


def _pad_id(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int], *, taught: set[int], vocabulary: int
) -> int | None:
    """A token that pads and does nothing else: one that ends no answer, else an end that was not taught, else an end.

    A token that begins texts never pads: `generate` leaves padding out of attention, wherever it finds it in a prompt.
    Nor, where there is a choice, does the taught end: who trains on would mask it as padding, and unlearn to stop.
    """
    own = model.generation_config.pad_token_id if model.generation_config is not None else None
    begin = {tokenizer.bos_token_id}
    named = _distinct_ids((own, tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None)), vocabulary)
    vocabulary_ids = tokenizer.get_vocab()
    reserved = _distinct_ids((vocabulary_ids.get(token) for token in _PAD_TOKENS), vocabulary)
    candidates = [
        *(id_ for id_ in named if id_ not in ends),
        *(id_ for id_ in named if id_ not in taught),
        *(id_ for id_ in reserved if id_ not in ends),
    ]
    return next((id_ for id_ in (*(id_ for id_ in candidates if id_ not in begin), *ends)), None)


def _max_new_tokens(model: PreTrainedModel, own: GenerationConfig) -> int:
    positions = getattr(model.config, "max_position_embeddings", None)
    positions = positions if isinstance(positions, int) and positions > 0 else MAX_NEW_TOKENS * 2
    # 20 is what earlier versions of transformers wrote for a config that says nothing.
    given = own.max_length if isinstance(own.max_length, int) and 20 < own.max_length <= positions else positions
    # The other half is the prompt's: past its last position a model fails.
    return max(1, min(given // 2, MAX_NEW_TOKENS))
