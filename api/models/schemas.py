"""Models below the model roots, as the API shows them."""

from typing import Literal

from pydantic import ConfigDict

from api.enumerations import ModelState
from api.pagination import Page, Resource
from domain.model_catalog import ListedModel


class ModelRefusalView(Resource):
    """Why a model can be neither teacher nor student."""

    code: str
    """A stable name of the reason, for programs."""
    message: str
    """What is wrong with the model, and what to do about it."""


class ModelWarningView(Resource):
    """What a client should know of a model that can be used."""

    code: str
    """A stable name of the warning, for programs."""
    message: str
    """One sentence for people."""


class ModelVocabularyView(Resource):
    """The vocabulary of a model."""

    size: int
    """The number of token ids that the model has embeddings for."""
    tokens: int
    """The number of tokens that its tokenizer knows."""
    sha256: str
    """The SHA-256 over all tokens with their ids, in hexadecimal. Models with equal digests can teach each other.
    Others may, as far as their tokens agree: the dry run says so."""


class ModelFactsView(Resource):
    """What the files of a model say about it."""

    family: str
    """The family of the model, as its config.json or the header of its GGUF file names it."""
    parameters: int
    """The number of its parameters; tied embeddings are counted once."""
    layers: int
    """The number of its layers."""
    layers_selectable: bool
    """Whether a student can be made of some of its layers (`from_teacher`)."""
    hidden_size: int
    """The width of its hidden states."""
    vocabulary: ModelVocabularyView
    """The vocabulary of the model."""
    dtype: str
    """The format of most stored weights: as safetensors name it (`BF16`), or GGML for a GGUF file (`Q4_K`)."""
    size_bytes: int
    """The size of the stored weights in bytes."""
    context_length: int | None
    """The longest sequence in tokens; null where the files do not say."""
    has_chat_template: bool
    """Whether the model has a chat template."""
    tied_embeddings: bool
    """Whether the output head is the embedding."""
    warnings: list[ModelWarningView]
    """What is not used of the files, or used in another way than they say."""


class ModelView(Resource):
    """A model that lies below a model root of the service."""

    id: str
    """The path of the model: what `path` of a teacher or a student may be."""
    object: Literal["model"] = "model"
    """The kind of the resource."""
    state: ModelState
    """A `usable` model may be teacher and student as far as its files tell; a `refused` one may be neither, `refusal`
    says why. The files of one that is `not_read` have not been looked at for want of time: ask again."""
    facts: ModelFactsView | None
    """What the files say; null unless the model is `usable`."""
    refusal: ModelRefusalView | None
    """Why the model is refused; null unless it is."""


class ModelPage(Page[ModelView, str]):
    """Models, in the order of their paths."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    complete: bool = True
    """Whether the model roots were searched to their ends. They are searched five directories deep and for 20,000
    entries; directories whose names begin with a dot are left out, and so are links out of the roots."""


def present_model(model: ListedModel) -> ModelView:
    """The view of a model."""
    description, facts = model.description, None
    if description is not None:
        known = description.facts
        vocabulary = ModelVocabularyView(
            size=known.vocabulary_size, tokens=description.tokens, sha256=description.vocabulary_sha256
        )
        facts = ModelFactsView(
            **{name: getattr(known, name) for name in _SHARED_FIELDS},
            context_length=known.max_positions,
            layers_selectable=description.layers_selectable,
            vocabulary=vocabulary,
            warnings=[ModelWarningView.model_validate(each) for each in known.warnings],
        )
    state: ModelState = "usable" if facts else "refused" if model.refusal else "not_read"
    refusal = None if model.refusal is None else ModelRefusalView.model_validate(model.refusal)
    return ModelView(id=model.path, state=state, facts=facts, refusal=refusal)


_SHARED_FIELDS = (
    "family",
    "parameters",
    "layers",
    "hidden_size",
    "dtype",
    "size_bytes",
    "has_chat_template",
    "tied_embeddings",
)
"""Fields of a view that the facts have under the same names."""
