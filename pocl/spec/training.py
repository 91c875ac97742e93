"""How the student is trained, evaluated and saved, and what the run may use."""

from collections.abc import Mapping
from math import ceil
from typing import Annotated, Final, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from pocl.spec.data import DataRef
from pocl.spec.frozen import FrozenModel
from pocl.spec.hub_names import BranchName, RepositoryName

SetName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
"""The name of an evaluation set."""


class Training(FrozenModel):
    """How the student is optimised."""

    batch_size: int = Field(default=64, ge=1, le=65536)
    """The number of samples of an optimiser step, over all micro-batches."""
    micro_batch_size: int | None = Field(default=None, ge=1, le=65536)
    """The most samples of a micro-batch; where null the engine chooses it and pins its choice."""
    micro_batch_tokens: int | None = Field(default=None, ge=1, le=1 << 22)
    """The most prompt and response tokens of a micro-batch, padding included; a longer sample is a micro-batch of its
    own. Where null the engine chooses it from the device's memory and pins its choice."""
    loss_chunk_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    """The number of response tokens whose logits are in memory at once, in training and in scoring. Where null the
    engine chooses it from the device's memory and pins its choice."""
    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    """The peak of the cosine schedule."""
    min_learning_rate: float = Field(default=1e-7, ge=0, le=1)
    """The learning rate at the end of the cosine schedule."""
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000)
    """The number of optimiser steps over which the learning rate rises from 0 to its peak, at the start of each
    schedule. Where a schedule has fewer steps, it reaches the peak with its last one."""
    last_batch: Literal["partial", "even", "drop"] = "partial"
    """What becomes of the samples of an epoch that fill no whole batch. `partial`: a batch of their own, whose step is
    as large as any (as published). `even`: as many steps, but all batches of the epoch are of equal size, but for one
    sample. `drop`: they are left out of the epoch, where there is a whole batch; the next epoch is shuffled anew."""
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    """The decoupled weight decay of AdamW."""
    decayed_parameters: Literal["matrices", "all"] = "matrices"
    """What the weight decay applies to: the weight matrices and embeddings, but no bias and no norm; or `all`
    parameters."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """The decay rates of the first and second moments of AdamW."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The norm to which the gradient of an optimiser step is clipped."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The format of products; `auto`: bf16 with fp32 master weights where the hardware multiplies it, else fp32."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """The probability of dropout in the student; null keeps what its config says."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate must not exceed learning_rate")
        return self

    def steps_per_epoch(self, samples: int) -> int:
        """The optimiser steps of an epoch over this many samples."""
        if self.last_batch == "drop":
            return max(1, samples // self.batch_size)
        return ceil(samples / self.batch_size)


class Sampling(FrozenModel):
    """Answers sampled at random, once with each seed; their scores are reported as mean and standard deviation."""

    temperature: float = Field(default=1.0, gt=0, le=100)
    """The temperature of sampling tokens, which has nothing to do with the temperature of the distillation."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """The mass of nucleus sampling: tokens are drawn from the fewest most likely ones whose probabilities reach it."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(
        default=(10, 20, 30, 40, 50), min_length=1, max_length=20
    )
    """The seeds with each of which every prompt is answered once."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ: equal seeds give equal answers")
        return self


class Evaluation(FrozenModel):
    """What is scored, and how: the teacher, the student before training, after each stage and at its end."""

    sets: Mapping[SetName, DataRef] = Field(default={}, max_length=8)
    """More held-out samples beside `data.test`, by names of your own, which scores are reported under. They are scored
    as the test samples are, and choose nothing."""
    max_rows: int | None = Field(default=None, ge=1, le=1_000_000)
    """The number of validation samples that are evaluated on, the first of the file; null takes all. Test samples and
    `sets` are always taken whole."""
    max_new_tokens: int = Field(default=256, ge=1, le=4096)
    """The most tokens that an answer may have."""
    batch_size: int | None = Field(default=None, ge=1, le=4096)
    """The number of samples that are answered at once, here and in the ranking: the rows in flight of generation. Where
    null the engine chooses it from the device's memory and pins its choice."""
    scoring_tokens: int | None = Field(default=None, ge=1, le=1 << 22)
    """The most prompt and response tokens that are scored at once, padding included; a longer sample is scored alone.
    Where null the engine chooses it from the device's memory and pins its choice."""
    teacher: bool = True
    """Whether the teacher is evaluated as well, once, before training."""
    sampling: Sampling | None = None
    """How answers are sampled beside the greedy ones, which remain the main figures; null samples none."""
    best_by: Literal["rouge_l", "exact_match"] = "rouge_l"
    """The score of the greedy answers to the validation samples by which a stage's weights are chosen for `best/`. Of
    stages with equal scores the one with the lower cross-entropy is the best, and of equals the earlier."""

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        if taken := sorted({"train", "validation", "test"} & set(self.sets)):
            raise ValueError(f"{taken[0]} names a data set of `data`: give the evaluation set another name")
        return self


class Checkpoints(FrozenModel):
    """Which states of a run are kept."""

    every_steps: int = Field(default=200, ge=1, le=1_000_000)
    """The number of optimiser steps between saves of the full training state; stage ends are saved as well."""
    keep: int = Field(default=2, ge=1, le=100)
    """The number of full training states that are kept; the weights of stage ends are kept beside them."""


GgufFormat = Literal["f32", "f16", "q8_0"]
GGUF_FORMATS: Final[tuple[GgufFormat, ...]] = get_args(GgufFormat)


class HubPush(FrozenModel):
    """A repository of the Hugging Face Hub that the service pushes the student to, once the job has succeeded. A run
    without the service pushes nothing."""

    repo: RepositoryName
    """The repository, as `owner/name`; it is made where there is none. The operator says which owners there may be."""
    private: bool = True
    """Whether the repository is private where it is made. To one that is public already nothing is pushed unless this
    is false."""
    branch: BranchName = "main"
    """The branch, which has the files of the student and no others afterwards; it is made where there is none."""
    checkpoint: Literal["final", "best"] = "final"
    """Which student: `final`, the weights of the last stage, with its GGUF files if any; or `best`, those of the stage
    that scores best."""


class Export(FrozenModel):
    """The form in which the student leaves the run."""

    dtype: Literal["fp32", "bf16", "fp16", "as_loaded"] = "fp32"
    """The format of the weights in `best/` and `final/`, rounded once from those that were trained; `as_loaded` is that
    of the student's files. Checkpoints from which a run continues have the weights that were trained, in fp32."""
    gguf: Annotated[tuple[GgufFormat, ...], Field(max_length=len(GGUF_FORMATS))] = ()
    """The formats in which `final/` also has the student as GGUF, with a Modelfile for Ollama; none unless given. A
    student whose family or tokenizer GGUF cannot say is refused before it is trained."""
    hub: HubPush | None = None
    """Where the student is pushed to on the Hugging Face Hub; null pushes nothing. No specification holds a token: the
    service has its own."""

    @field_validator("gguf")
    @classmethod
    def _named_once(cls, formats: tuple[GgufFormat, ...]) -> tuple[GgufFormat, ...]:
        if len(set(formats)) < len(formats):
            raise ValueError("name each format once")
        return formats


class Resources(FrozenModel):
    """What the run may use of its machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The kind of device; `auto` takes a GPU where there is one."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """The number of CPU threads; where null the engine chooses it and pins its choice."""
    deterministic: bool = False
    """Whether a run on a GPU takes only kernels that give the same bits each time, so that a repeated or a resumed run
    ends in the same weights; it is slower, and an operation without such a kernel is refused. A run on a CPU is exact
    without it."""
    compile: bool = False
    """Whether the student's layers and the elementwise part of the loss are compiled (torch.compile) for training; on a
    GPU alone."""
    graphs: bool = False
    """Whether the student's passes are recorded as CUDA graphs and replayed; on a GPU alone."""
    prefetch: bool = False
    """Whether the next micro-batch is prepared while the GPU works on the one before, and copied to it with the cached
    states of the teacher on a stream of their own; on a GPU alone."""
    generator: Literal["engine", "vllm"] = "engine"
    """What generates answers: the engine's own loop, or vLLM, which must be installed and must know the student."""
