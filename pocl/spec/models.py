"""Where teacher and student come from."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pocl.spec.frozen import ExactlyOneOf, FrozenModel


class HubModel(FrozenModel):
    """A model on the Hugging Face Hub. Only safetensors are loaded, and never remote code."""

    repo: str = Field(pattern=r"^[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}$")
    """`owner/name`."""
    revision: str = Field(default="main", pattern=r"^[\w./-]{1,128}$")
    """Branch, tag or commit. The run records the commit that it resolved to."""


class LayersOfTeacher(FrozenModel):
    """A student cut out of the teacher: its embeddings, final norm and head, and some of its layers."""

    layers: tuple[Annotated[int, Field(ge=0, le=1023)], ...] = Field(min_length=1, max_length=1024)
    """The teacher's layers to keep, counted from 0, in rising order."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must rise without repeats")
        return self


class RandomModel(FrozenModel):
    """A freshly initialised model with a byte-level tokenizer: nothing to download."""

    family: Literal["gpt2", "opt", "llama", "qwen2"] = "llama"
    layers: int = Field(default=2, ge=1, le=48)
    hidden_size: int = Field(default=64, ge=8, le=4096)
    heads: int = Field(default=4, ge=1, le=64)
    max_positions: int = Field(default=512, ge=16, le=32768)
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError("hidden_size must be an even multiple of heads")
        return self


class ModelRef(ExactlyOneOf):
    """Where a model comes from: one of the forms below."""

    path: str | None = Field(default=None, min_length=1, max_length=1024)
    """A directory that `from_pretrained` loads (safetensors), or a `.gguf` file."""
    hub: HubModel | None = None
    random: RandomModel | None = None
    checkpoint: str | None = Field(default=None, pattern=r"^ckpt_[0-9a-z]{8,40}$")
    """The id of a checkpoint that an earlier job of the service made."""

    @classmethod
    def _field_names(cls) -> tuple[str, ...]:
        return ("path", "hub", "random", "checkpoint")


class StudentRef(ModelRef):
    """A student: like a teacher, or cut out of the teacher."""

    from_teacher: LayersOfTeacher | None = None

    @classmethod
    def _field_names(cls) -> tuple[str, ...]:
        return (*ModelRef._field_names(), "from_teacher")
