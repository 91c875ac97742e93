"""Where teacher and student come from."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pocl.spec.frozen import ExactlyOneOf, FrozenModel
from pocl.spec.hub_names import RepositoryName, Revision


class HubModel(FrozenModel):
    """A model on the Hugging Face Hub. Only safetensors are loaded, and never remote code."""

    repo: RepositoryName
    """The repository, as `owner/name`."""
    revision: Revision = "main"
    """A branch, tag or commit; the result says which commit it named."""


class LayersOfTeacher(FrozenModel):
    """A student made of the teacher's embeddings, final norm and head, and of some of its layers."""

    layers: tuple[Annotated[int, Field(ge=0, le=1023)], ...] = Field(min_length=1, max_length=1024)
    """The layers of the teacher that are kept, counted from 0, in ascending order."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must rise without repeats")
        return self


class RandomModel(FrozenModel):
    """A freshly initialised model with a byte-level tokenizer: nothing to download."""

    family: Literal["gpt2", "opt", "llama", "qwen2"] = "llama"
    """The family of the model."""
    layers: int = Field(default=2, ge=1, le=48)
    """The number of layers."""
    hidden_size: int = Field(default=64, ge=8, le=4096)
    """The width of the hidden states, an even multiple of `heads`."""
    heads: int = Field(default=4, ge=1, le=64)
    """The number of attention heads."""
    max_positions: int = Field(default=512, ge=16, le=32768)
    """The longest sequence, in tokens."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """The seed of the initial weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError("hidden_size must be an even multiple of heads")
        return self


class ModelRef(ExactlyOneOf):
    """Where a model comes from; exactly one field is given."""

    path: str | None = Field(default=None, min_length=1, max_length=1024)
    """A directory that `from_pretrained` loads (safetensors), or a `.gguf` file."""
    hub: HubModel | None = None
    """A model on the Hugging Face Hub."""
    random: RandomModel | None = None
    """A freshly initialised model."""
    checkpoint: str | None = Field(default=None, pattern=r"^ckpt_[0-9a-z]{8,40}$")
    """The id of a checkpoint that an earlier job of the service made."""

    @classmethod
    def _alternatives(cls) -> tuple[str, ...]:
        return ("path", "hub", "random", "checkpoint")


class StudentRef(ModelRef):
    """Where a student comes from: from where a teacher may come, or out of the teacher."""

    from_teacher: LayersOfTeacher | None = None
    """Some layers of the teacher."""

    @classmethod
    def _alternatives(cls) -> tuple[str, ...]:
        return (*ModelRef._alternatives(), "from_teacher")
