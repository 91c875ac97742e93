"""The facts themselves, and those of a student that is cut out of its teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pocl.errors import FieldError, SpecInvalid

MAX_LAYERS = 1024
"""A specification counts layers up to here, so a model has no more."""


@dataclass(frozen=True)
class ModelFacts:
    """A causal language model as its files describe it."""

    family: str
    """`model_type` of config.json, or the architecture that a GGUF header names."""
    vocabulary_size: int
    """Rows of the output head, which may be more than the tokenizer knows."""
    layers: int
    hidden_size: int
    parameters: int
    """Trainable numbers, tied embeddings counted once."""
    layer_parameters: tuple[int, ...] = field(repr=False)
    """Those of each layer; they sum to `parameters` less embeddings, head and final norm."""
    size_bytes: int
    """Bytes of the stored weights; as fp32 for a model that is not stored."""
    max_positions: int | None
    """Longest sequence, in tokens; null where the files do not say."""
    has_chat_template: bool
    tied_embeddings: bool
    tokens: Mapping[str, int] = field(repr=False, compare=False)
    """Id of every token that the tokenizer knows, added tokens included."""


def layer_pruned_facts(teacher: ModelFacts, layers: Sequence[int]) -> ModelFacts:
    """The facts of a student that keeps only these layers of the teacher, counted from 0.

    Raises:
        SpecInvalid: the teacher has no such layer.
    """
    check_layers_exist(layers, teacher.layers)
    kept = tuple(teacher.layer_parameters[index] for index in layers)
    parameters = teacher.parameters - sum(teacher.layer_parameters) + sum(kept)
    return replace(teacher, layers=len(layers), parameters=parameters, layer_parameters=kept, size_bytes=4 * parameters)


def check_sequence_length(max_length: int, max_positions: int | None) -> None:
    """Raise SpecInvalid where rows of `max_length` tokens have more positions than the model."""
    if max_positions is not None and max_length > max_positions:
        detail = f"the model has {max_positions} positions; rows of {max_length} tokens do not fit"
        raise SpecInvalid([FieldError("/data/max_length", "exceeds_model_positions", detail)])


def check_layers_exist(layers: Sequence[int], count: int) -> None:
    """Raise SpecInvalid, with a pointer to each layer that a teacher of `count` layers does not have."""
    problems = [
        FieldError(
            pointer=f"/student/from_teacher/layers/{position}",
            code="layer_missing",
            detail=f"the teacher has layers 0 to {count - 1}, not {layer}",
        )
        for position, layer in enumerate(layers)
        if not 0 <= layer < count
    ]
    if problems:
        raise SpecInvalid(problems)
