"""What a distillation job is: the specification that clients post and the engine runs.

Frozen, and unknown fields are refused: a typo never trains. :func:`resolve` lays a client's fields over
a preset and returns a specification that names every value; that is what is stored, returned and run.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from pocl.errors import Problem, SpecInvalid


class Frozen(BaseModel):
    """A value: immutable, closed to unknown fields, with finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class _OneForm(Frozen):
    """A reference written in exactly one of several forms; the class variable names them."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        forms = [name for name in self._forms() if getattr(self, name) is not None]
        if len(forms) != 1:
            raise ValueError(f"give exactly one of {', '.join(self._forms())}; got {', '.join(forms) or 'none'}")
        return self

    @classmethod
    def _forms(cls) -> tuple[str, ...]:
        raise TypeError(f"{cls.__name__} names no forms")


# --- Models ---------------------------------------------------------------------------------------------


class HubModel(Frozen):
    """A model on the Hugging Face Hub. Only safetensors are loaded, and never remote code."""

    repo: str = Field(pattern=r"^[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}$")
    """`owner/name`."""
    revision: str = Field(default="main", pattern=r"^[\w./-]{1,128}$")
    """Branch, tag or commit. The run records the commit that it resolved to."""


class LayersOfTeacher(Frozen):
    """A student cut out of the teacher: its embeddings, final norm and head, and some of its layers."""

    layers: tuple[Annotated[int, Field(ge=0, le=1023)], ...] = Field(min_length=1, max_length=1024)
    """The teacher's layers to keep, counted from 0, in rising order."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must rise without repeats")
        return self


class RandomModel(Frozen):
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


class ModelRef(_OneForm):
    """Where a model comes from: one of the forms below."""

    path: str | None = Field(default=None, min_length=1, max_length=1024)
    """A directory that `from_pretrained` loads (safetensors), or a `.gguf` file."""
    hub: HubModel | None = None
    random: RandomModel | None = None
    checkpoint: str | None = Field(default=None, pattern=r"^ckpt_[0-9a-z]{8,40}$")
    """The id of a checkpoint that an earlier job of the service made."""

    @classmethod
    def _forms(cls) -> tuple[str, ...]:
        return ("path", "hub", "random", "checkpoint")


class StudentRef(ModelRef):
    """A student: like a teacher, or cut out of the teacher."""

    from_teacher: LayersOfTeacher | None = None

    @classmethod
    def _forms(cls) -> tuple[str, ...]:
        return (*ModelRef._forms(), "from_teacher")


# --- Data -----------------------------------------------------------------------------------------------


class DataRef(_OneForm):
    """Where rows come from: a JSONL file, or a data set that was uploaded to the service."""

    path: str | None = Field(default=None, min_length=1, max_length=1024)
    dataset: str | None = Field(default=None, pattern=r"^ds_[0-9a-z]{8,40}$")

    @classmethod
    def _forms(cls) -> tuple[str, ...]:
        return ("path", "dataset")


class Data(Frozen):
    train: DataRef
    """Rows that are ranked and trained on."""
    validation: DataRef | None = None
    """Held-out rows, never trained on; evaluation needs them."""
    template: Literal["auto", "chat", "alpaca"] = "auto"
    """How an instruction becomes a prompt. `auto`: the teacher's chat template where it has one, else Alpaca."""
    max_length: int = Field(default=512, ge=8, le=32768)
    """Tokens of prompt and response together; a longer response is cut at its end."""
    max_prompt_length: int = Field(default=256, ge=1, le=32767)
    """Tokens of the prompt; a longer prompt is cut from its left."""

    @model_validator(mode="after")
    def _room_for_a_response(self) -> Self:
        if self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be smaller than max_length, so that a response fits")
        return self


# --- Knowledge-distillation methods ---------------------------------------------------------------------


class KDMethod(StrEnum):
    SFT = "sft"
    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JS = "js"
    TVD = "tvd"
    SKEW_FORWARD_KL = "skew_forward_kl"
    SKEW_REVERSE_KL = "skew_reverse_kl"


class _Method(Frozen):
    scale_by_tau_squared: bool = True
    """Multiply the divergence by temperature squared, which keeps its gradient of one size (Hinton et al. 2015)."""


class SFT(Frozen):
    """Cross-entropy on the reference responses; the teacher is not run."""

    name: Literal[KDMethod.SFT] = KDMethod.SFT


class ForwardKL(_Method):
    """KL(p‖q), p the teacher, q the student: the student covers all that the teacher finds likely."""

    name: Literal[KDMethod.FORWARD_KL] = KDMethod.FORWARD_KL


class ReverseKL(_Method):
    """KL(q‖p): the student keeps to what the teacher finds likely."""

    name: Literal[KDMethod.REVERSE_KL] = KDMethod.REVERSE_KL


class JS(_Method):
    """Generalised Jensen-Shannon: beta KL(p‖m) + (1-beta) KL(q‖m), m = beta p + (1-beta) q (GKD, eq. 1)."""

    name: Literal[KDMethod.JS] = KDMethod.JS
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture. The ends are `forward_kl` and `reverse_kl`."""


class TVD(_Method):
    """Total variation distance, half the sum of |p-q|. It is bounded, so tau squared is off by default."""

    name: Literal[KDMethod.TVD] = KDMethod.TVD
    scale_by_tau_squared: bool = False


class SkewForwardKL(_Method):
    """KL(p ‖ alpha p + (1-alpha) q) (DistiLLM)."""

    name: Literal[KDMethod.SKEW_FORWARD_KL] = KDMethod.SKEW_FORWARD_KL
    alpha: float = Field(default=0.1, ge=0, lt=1)


class SkewReverseKL(_Method):
    """KL(q ‖ (1-alpha) p + alpha q) (DistiLLM)."""

    name: Literal[KDMethod.SKEW_REVERSE_KL] = KDMethod.SKEW_REVERSE_KL
    alpha: float = Field(default=0.1, ge=0, lt=1)


Method = Annotated[SFT | ForwardKL | ReverseKL | JS | TVD | SkewForwardKL | SkewReverseKL, Field(discriminator="name")]
METHODS: dict[KDMethod, type[Frozen]] = {
    KDMethod.SFT: SFT,
    KDMethod.FORWARD_KL: ForwardKL,
    KDMethod.REVERSE_KL: ReverseKL,
    KDMethod.JS: JS,
    KDMethod.TVD: TVD,
    KDMethod.SKEW_FORWARD_KL: SkewForwardKL,
    KDMethod.SKEW_REVERSE_KL: SkewReverseKL,
}


# --- Curriculum -----------------------------------------------------------------------------------------


class Range(Frozen):
    """A value that rises from stage to stage: start + (end - start) i / (n - 1); with one stage, start."""

    start: float
    end: float


class TemperatureRange(Range):
    start: float = Field(default=1.0, gt=0, le=100)
    end: float = Field(default=2.0, gt=0, le=100)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.start > self.end:
            raise ValueError("temperature.start must not exceed temperature.end: the load rises")
        return self


class WeightRange(Range):
    start: float = Field(default=0.7, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.start > self.end:
            raise ValueError("kd_weight.start must not exceed kd_weight.end: the load rises")
        return self


class Ranking(Frozen):
    """The difficulty measurer: the student as it starts answers and scores every training sample."""

    rrf_k: int = Field(default=60, ge=1, le=10_000)
    """k of reciprocal rank fusion, 1/(k + rank)."""
    max_new_tokens: int = Field(default=256, ge=1, le=4096)


class ByEpochs(Frozen):
    """A stage ends after its epochs."""

    by: Literal["epochs"] = "epochs"


class ByConvergence(Frozen):
    """A stage ends once a generation metric on the validation rows no longer improves, or after its epochs.

    Cross-entropy is not offered: in published POCL runs it worsens while ROUGE-L rises.
    """

    by: Literal["convergence"]
    metric: Literal["rouge_l", "exact_match"] = "rouge_l"
    patience: int = Field(default=1, ge=1, le=100)
    """Epochs without improvement after which the stage ends."""
    min_delta: float = Field(default=0.1, ge=0, le=100)
    """Points by which the metric must rise to count as improved."""


class NoCurriculum(Frozen):
    """Control: all samples shuffled, one stage, one learning-rate schedule, as many optimiser steps."""

    kind: Literal["no_curriculum"]
    temperature: float | None = Field(default=None, gt=0, le=100)
    """Constant temperature; the start of `curriculum.temperature` unless given."""
    kd_weight: float | None = Field(default=None, ge=0, le=1)
    """Constant KD weight; the middle of `curriculum.kd_weight` unless given."""


class ShuffledStages(Frozen):
    """Control: the same stages, temperatures and weights over a random order instead of the ranking."""

    kind: Literal["shuffled_stages"]


class ConstantTemperature(Frozen):
    """Control: the same stages over the ranking, at one temperature."""

    kind: Literal["constant_temperature"]
    temperature: float | None = Field(default=None, gt=0, le=100)
    """The start of `curriculum.temperature` unless given."""


Control = Annotated[NoCurriculum | ShuffledStages | ConstantTemperature, Field(discriminator="kind")]
Advance = Annotated[ByEpochs | ByConvergence, Field(discriminator="by")]


class Curriculum(Frozen):
    """Baby Step: stage i trains on the easiest floor(N/n) (i+1) samples, the last stage on all N."""

    stages: int = Field(default=4, ge=1, le=64)
    epochs_per_stage: int = Field(default=8, ge=1, le=1000)
    temperature: TemperatureRange = TemperatureRange()
    kd_weight: WeightRange = WeightRange()
    """w in loss = (1-w) CE + w D."""
    ranking: Ranking = Ranking()
    advance: Advance = ByEpochs()
    optimizer_at_stage: Literal["restart", "carry"] = "restart"
    """`restart`: a new optimiser and schedule at each stage; `carry`: one of each over all stages."""
    control: Control | None = None


# --- Training, evaluation, checkpoints ------------------------------------------------------------------


class Training(Frozen):
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


class Evaluation(Frozen):
    """Greedy answers to the validation rows: before training, after each stage, and of the teacher."""

    max_rows: int | None = Field(default=None, ge=1, le=1_000_000)
    """Evaluate on the first rows only; null: all."""
    max_new_tokens: int = Field(default=256, ge=1, le=4096)
    batch_size: int = Field(default=16, ge=1, le=1024)
    teacher: bool = True
    """Evaluate the teacher as well, once."""


class Checkpoints(Frozen):
    every_steps: int = Field(default=200, ge=1, le=1_000_000)
    """Optimiser steps between saves of the full training state; each stage end is saved as well."""
    keep: int = Field(default=2, ge=1, le=100)
    """Full training states kept; the weights of stage ends are kept beside them."""


class Resources(Frozen):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads; chosen and recorded by the engine where null."""


PresetName = Literal["paper", "pocl_official", "quick"]


class DistillationSpec(Frozen):
    """One distillation job."""

    preset: PresetName = "paper"
    """Defaults under the other fields: `paper`; `pocl_official`, the published code's loss scaling; `quick`."""
    teacher: ModelRef | None = None
    """Required by every method but `sft`; where `sft` has one, the student is compared with it."""
    student: StudentRef
    data: Data
    method: Method = ForwardKL()
    """A name, or an object with the method's parameters."""
    curriculum: Curriculum = Curriculum()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    resources: Resources = Resources()
    seed: int = Field(default=10, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.teacher is None and not isinstance(self.method, SFT):
            raise ValueError(f"method {self.method.name.value} needs a teacher")
        if self.teacher is None and self.student.from_teacher is not None:
            raise ValueError("student.from_teacher needs a teacher")
        if isinstance(self.curriculum.advance, ByConvergence) and self.data.validation is None:
            raise ValueError("curriculum.advance by convergence needs data.validation")
        return self


# --- Presets --------------------------------------------------------------------------------------------

PRESETS: dict[str, dict[str, Any]] = {
    # The defaults of the classes above are the paper's.
    "paper": {},
    "pocl_official": {},
    "quick": {
        "data": {"max_length": 256, "max_prompt_length": 192},
        "curriculum": {"epochs_per_stage": 1, "ranking": {"max_new_tokens": 32}},
        "training": {"batch_size": 8, "learning_rate": 3e-4, "min_learning_rate": 3e-5},
        "evaluation": {"max_new_tokens": 32, "max_rows": 64},
        "checkpoints": {"every_steps": 50},
    },
}

_OFFICIAL_METHODS: dict[str, dict[str, Any]] = {
    # The published losses scale by tau squared for these three only, and its JS weighs the teacher by 0.1.
    KDMethod.FORWARD_KL: {"scale_by_tau_squared": True},
    KDMethod.JS: {"scale_by_tau_squared": True, "beta": 0.1},
    KDMethod.SKEW_REVERSE_KL: {"scale_by_tau_squared": True},
    KDMethod.REVERSE_KL: {"scale_by_tau_squared": False},
    KDMethod.SKEW_FORWARD_KL: {"scale_by_tau_squared": False},
    KDMethod.TVD: {"scale_by_tau_squared": False},
    KDMethod.SFT: {},
}


def resolve(raw: Mapping[str, Any]) -> DistillationSpec:
    """Lay `raw` over its preset and return the specification with every default named.

    Raises:
        SpecInvalid: with a pointer and a sentence for every field that is wrong.
    """
    layered = _over_preset(raw)
    try:
        spec = DistillationSpec.model_validate(layered)
    except ValidationError as error:
        raise SpecInvalid(problems_of(error)) from None
    return _name_control_values(spec)


def problems_of(error: ValidationError) -> list[Problem]:
    """Pydantic's findings as problems: pointers into what the caller wrote, and never the value itself."""
    return [
        Problem(pointer=_pointer(found["loc"]), code=found["type"], detail=_sentence(found))
        for found in error.errors(include_input=False, include_url=False)
    ]


def _over_preset(raw: Mapping[str, Any]) -> dict[str, Any]:
    preset = raw.get("preset", "paper")
    method = raw.get("method", KDMethod.FORWARD_KL.value)
    method = {"name": method} if isinstance(method, str) else method
    if preset == "pocl_official" and isinstance(method, Mapping) and isinstance(method.get("name"), str):
        method = {**_OFFICIAL_METHODS.get(method["name"], {}), **method}
    # An unknown preset is left for the validation to name.
    under = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    return _merge(under, {**raw, "method": method})


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**under, **over}
    for key, value in under.items():
        if isinstance(value, Mapping) and isinstance(over.get(key), Mapping):
            merged[key] = _merge(value, over[key])
    return merged


def _name_control_values(spec: DistillationSpec) -> DistillationSpec:
    curriculum, control = spec.curriculum, spec.curriculum.control
    named: dict[str, float] = {}
    if isinstance(control, NoCurriculum | ConstantTemperature) and control.temperature is None:
        named["temperature"] = curriculum.temperature.start
    if isinstance(control, NoCurriculum) and control.kd_weight is None:
        named["kd_weight"] = (curriculum.kd_weight.start + curriculum.kd_weight.end) / 2
    if not named or control is None:
        return spec
    control = control.model_copy(update=named)
    return spec.model_copy(update={"curriculum": curriculum.model_copy(update={"control": control})})


def _sentence(found: ErrorDetails) -> str:
    if found["type"] == "union_tag_invalid":
        # The one sentence of pydantic that quotes the value, and that shows enum members as Python does.
        return "must be one of " + re.sub(r"<[\w.]+: ('\w+')>", r"\1", found["ctx"]["expected_tags"])
    return found["msg"].removeprefix("Value error, ")


_TAGS = {*KDMethod, "epochs", "convergence", "no_curriculum", "shuffled_stages", "constant_temperature"}


def _pointer(location: tuple[int | str, ...]) -> str:
    # A tagged union puts its tag into the location; the caller wrote no such key.
    kept = [
        str(part)
        for before, part in zip(("", *location), location, strict=False)
        if not (part in _TAGS and before in ("method", "advance", "control"))
    ]
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in kept)
