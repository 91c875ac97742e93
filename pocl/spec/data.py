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


class DataSplit(FrozenModel):
    """Held-out samples that are taken out of the training samples.

    Which samples those are follows from their content and the seed alone, and not from their order or from other
    samples: a sample that is added moves none of the others, and equal samples are never on two sides.
    """

    validation: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The share that becomes validation samples, about so many: 0.1 takes a tenth."""
    test: float = Field(default=0.0, ge=0.0, lt=1.0)
    """The share that becomes test samples."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Another seed takes other samples."""

    @model_validator(mode="after")
    def _something_is_split(self) -> Self:
        if not 0 < self.validation + self.test < 1:
            raise ValueError(
                "validation and test together must be above 0 and below 1, so that samples to train on stay"
            )
        return self


class Data(FrozenModel):
    """The samples of a job, and how they become tokens."""

    train: DataRef
    """The samples that are ranked and trained on."""
    validation: DataRef | None = None
    """Held-out samples, which are never trained on, and by which the best stage is chosen."""
    test: DataRef | None = None
    """Held-out samples that choose nothing, neither the best stage nor when a stage ends: their scores are those to
    report. Teacher, untrained student, each stage that becomes the best, and the final student are scored on them."""
    split: DataSplit | None = None
    """Takes validation and test samples out of the training samples, instead of `validation` and `test`."""
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

    @model_validator(mode="after")
    def _held_out_once(self) -> Self:
        for part in ("validation", "test"):
            if self.split is not None and getattr(self.split, part) and getattr(self, part) is not None:
                raise ValueError(f"give {part} or split.{part}, and not both")
        return self

    @property
    def has_validation(self) -> bool:
        """Whether there are validation samples, of their own or out of the training samples."""
        return self.validation is not None or (self.split is not None and self.split.validation > 0)
