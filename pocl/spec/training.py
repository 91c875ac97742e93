"""How the student is trained, evaluated and saved, and what the run may use."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pocl.spec.frozen import FrozenModel


class Training(FrozenModel):
    batch_size: int = Field(default=64, ge=1, le=65536)
    """Samples per optimiser step, over all micro-batches."""
    micro_batch_size: int | None = Field(default=None, ge=1, le=65536)
    """Samples in memory at once; chosen and recorded by the engine where null."""
    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    min_learning_rate: float = Field(default=1e-7, ge=0, le=1)
    """Where the cosine ends."""
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000)
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 products with fp32 master weights where the hardware multiplies bf16, else fp32."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Null keeps what the student's config says."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate must not exceed learning_rate")
        return self


class Sampling(FrozenModel):
    """Answers drawn at random, once with each seed; their scores are reported as mean and standard deviation."""

    temperature: float = Field(default=1.0, gt=0, le=100)
    """Of the drawing of tokens; it has nothing to do with the temperature of the loss."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the fewest most likely tokens whose probabilities sum to at least this; 1: from all."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(
        default=(10, 20, 30, 40, 50), min_length=1, max_length=20
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ: equal seeds give equal answers")
        return self


class Evaluation(FrozenModel):
    """Answers to the validation rows: before training, after each stage, and of the teacher."""

    max_rows: int | None = Field(default=None, ge=1, le=1_000_000)
    """Evaluate on the first rows only; null: all."""
    max_new_tokens: int = Field(default=256, ge=1, le=4096)
    batch_size: int = Field(default=16, ge=1, le=1024)
    teacher: bool = True
    """Evaluate the teacher as well, once."""
    sampling: Sampling | None = None
    """Score sampled answers beside the greedy ones, which remain the main figures; null: greedy answers alone."""
    best_by: Literal["rouge_l", "exact_match"] = "rouge_l"
    """The score of the greedy answers by which a stage's weights are chosen for `best/`."""


class Checkpoints(FrozenModel):
    every_steps: int = Field(default=200, ge=1, le=1_000_000)
    """Optimiser steps between saves of the full training state; each stage end is saved as well."""
    keep: int = Field(default=2, ge=1, le=100)
    """Full training states kept; the weights of stage ends are kept beside them."""


class Resources(FrozenModel):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads; chosen and recorded by the engine where null."""
