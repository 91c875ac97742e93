"""The facts of a model, those of a student made of its teacher's layers, and checks of a specification against them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pocl.errors import FieldError, SpecInvalid
from pocl.inspect.family_support import check_layers_selectable

MAX_LAYERS = 1024
"""The most layers that a specification can number, and so the most that a model may have."""


@dataclass(frozen=True)
class ModelWarning:
    """What a client should know of a model that is used."""

    code: str
    message: str


@dataclass(frozen=True)
class ModelFacts:
    """A causal language model as its files describe it."""

    family: str
    """`model_type` of config.json, or the architecture that a GGUF header names."""
    vocabulary_size: int
    """The rows of embeddings and output head, which may be more or fewer than the tokens of the tokenizer."""
    layers: int
    hidden_size: int
    parameters: int
    """The trainable numbers; tied embeddings are counted once."""
    layer_parameters: tuple[int, ...] = field(repr=False)
    """The parameters of each layer; they sum to `parameters` less embeddings, head and final norm."""
    size_bytes: int
    """The bytes of the stored weights; of a model that is not stored, its bytes in fp32."""
    max_positions: int | None
    """The longest sequence, in tokens; None where the files do not say."""
    has_chat_template: bool
    tied_embeddings: bool
    dtype: str
    """The format of most stored weights: as safetensors names it (`BF16`), of a GGUF file as GGML does (`Q4_K`)."""
    idle_layer_parameters: tuple[int, ...] = field(repr=False, kw_only=True, default=())
    """Of each layer, the parameters of experts that a token is not given to; empty where there are none."""
    tokens: Mapping[str, int] = field(repr=False, compare=False)
    """The id of every token that the tokenizer knows, added tokens included."""
    is_described: bool = field(default=True, compare=False)
    """Whether names and shapes of all weights were compared with those that the config asks for."""
    warnings: tuple[ModelWarning, ...] = field(default=(), compare=False)
    """What is not used of the files, or used in another way than they say."""


def facts_of_selected_layers(teacher: ModelFacts, layers: Sequence[int]) -> ModelFacts:
    """The facts of a student that keeps only these layers of the teacher, counted from 0.

    Raises:
        SpecInvalid: the teacher has no such layer, or no layers can be taken out of its family.
    """
    check_layers_selectable(teacher.family)
    check_layers_exist(layers, teacher.layers)
    selected = tuple(teacher.layer_parameters[index] for index in layers)
    parameters = teacher.parameters - sum(teacher.layer_parameters) + sum(selected)
    idle = teacher.idle_layer_parameters
    return replace(
        teacher,
        layers=len(layers),
        parameters=parameters,
        layer_parameters=selected,
        idle_layer_parameters=tuple(idle[index] for index in layers) if idle else (),
        size_bytes=4 * parameters,
    )


def check_sequence_length(max_length: int, max_positions: int | None) -> None:
    """Check that samples of `max_length` tokens fit into the positions of a model.

    Raises:
        SpecInvalid: they do not.
    """
    if max_positions is not None and max_length > max_positions:
        detail = f"the model has {max_positions} positions; samples of {max_length} tokens do not fit"
        raise SpecInvalid([FieldError("/data/max_length", "exceeds_model_positions", detail)])


def check_layers_exist(layers: Sequence[int], count: int) -> None:
    """Check that a teacher of `count` layers has all of `layers`.

    Raises:
        SpecInvalid: it lacks some; each has a pointer.
    """
    field_errors = [
        FieldError(
            pointer=f"/student/from_teacher/layers/{position}",
            code="layer_missing",
            detail=f"the teacher has layers 0 to {count - 1}, not {layer}",
        )
        for position, layer in enumerate(layers)
        if not 0 <= layer < count
    ]
    if field_errors:
        raise SpecInvalid(field_errors)
