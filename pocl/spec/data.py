"""The samples that a job trains on and is evaluated on, and how they become tokens."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pocl.spec.frozen import ExactlyOneOf, FrozenModel


class DataRef(ExactlyOneOf):
    """Where samples come from: a JSONL file, or a data set that was uploaded to the service."""

    path: str | None = Field(default=None, min_length=1, max_length=1024)
    """The path of a JSONL file, for the engine alone; jobs of the service name a data set."""
    dataset: str | None = Field(default=None, pattern=r"^ds_[0-9a-z]{8,40}$")
    """The id of an uploaded data set."""

    @classmethod
    def _alternatives(cls) -> tuple[str, ...]:
        return ("path", "dataset")


class Data(FrozenModel):
    """The samples of a job, and how they become tokens."""

    train: DataRef
    """The samples that are ranked and trained on."""
    validation: DataRef | None = None
    """Held-out samples, which are never trained on; without them nothing is evaluated."""
    template: Literal["auto", "chat", "alpaca"] = "auto"
    """How an instruction becomes a prompt; `auto` takes the teacher's chat template where it has one, else Alpaca's."""
    max_length: int = Field(default=512, ge=8, le=32768)
    """The most tokens of prompt and response together; a longer response is cut at its end."""
    max_prompt_length: int = Field(default=256, ge=1, le=32767)
    """The most tokens of the prompt; a longer prompt is cut from its left."""

    @model_validator(mode="after")
    def _room_for_a_response(self) -> Self:
        if self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be smaller than max_length, so that a response fits")
        return self
