"""One distillation job, whole."""

import hashlib
from collections.abc import Mapping
from datetime import date
from typing import Any, Final, Literal, Self

from pydantic import Field, model_validator

from pocl.spec.curriculum import ByConvergence, Curriculum, ModelRanker, TeacherRanker
from pocl.spec.data import Data, DataRef
from pocl.spec.frozen import FrozenModel
from pocl.spec.methods import ForwardKL, Method
from pocl.spec.models import ModelRef, StudentRef
from pocl.spec.training import Checkpoints, Evaluation, Export, Resources, Training

PresetName = Literal["paper", "pocl_official", "quick"]
RANKING_MODEL_POINTER: Final = "/curriculum/ranking/ranker/model"
ANSWERED_DATA: Final = ("/data/train", "/data/validation")
"""The data, by the JSON pointers of :attr:`DistillationSpec.data_refs`, whose samples must have answers: they are
trained on, or choose the best stage."""
ENGINE_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "training": ("micro_batch_size", "micro_batch_tokens", "loss_chunk_tokens"),
    "evaluation": ("batch_size", "scoring_tokens"),
    "resources": ("threads",),
}
"""The fields, by the part that they are in, that the engine chooses for a machine where a client left them null. They
change the rounding of a run and its speed, and nothing else."""


class DistillationSpec(FrozenModel):
    """One distillation job."""

    preset: PresetName = "paper"
    """The defaults of all other fields: `paper`, `pocl_official` (the published code's loss scaling, and how it answers
    when it ranks) or `quick`."""
    teacher: ModelRef | None = None
    """The model to learn from. Every method but `sft` needs one; with `sft` the student is only compared with it."""
    student: StudentRef
    """The model to train."""
    data: Data
    """The samples that are trained and evaluated on."""
    method: Method = ForwardKL()
    """The divergence that is minimised: the name of a method, or an object with its parameters."""
    curriculum: Curriculum = Curriculum()
    """The stages, how samples are ranked for them, and what rises from one to the next."""
    training: Training = Training()
    """The optimiser, its batches and its learning rate."""
    evaluation: Evaluation = Evaluation()
    """What is scored, how, and by which score the best stage is chosen."""
    checkpoints: Checkpoints = Checkpoints()
    """How often the state of the training is saved, and how many states are kept."""
    export: Export = Export()
    """How the weights of the student are written."""
    resources: Resources = Resources()
    """The device, the threads and the kernels that the run may use."""
    seed: int = Field(default=10, ge=0, lt=2**31)
    """The seed of shuffling and dropout: equal seeds give equal weights on one machine."""

    @property
    def recipe_digest(self) -> str:
        """SHA-256 over what shapes the training of a stage: method, curriculum and training.

        Choices that the engine pins for a machine, and paths that differ between machines, have no part in it.
        """
        training = self.training.model_copy(update={"micro_batch_size": None})
        # Null entered the digest when the micro-batch was the only choice: stored digests stay comparable.
        training_json = training.model_dump_json(exclude=set(ENGINE_CHOICES["training"]) - {"micro_batch_size"})
        parts = (self.method.model_dump_json(), self.curriculum.model_dump_json(), training_json)
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def ranking_model(self) -> ModelRef | None:
        """The model that ranks and is used for nothing else; None where there is none, or nothing is ranked."""
        ranker = self.curriculum.ranking.ranker
        return ranker.model if isinstance(ranker, ModelRanker) and self.curriculum.uses_ranking else None

    @property
    def artifacts_never_made(self) -> Mapping[str, str]:
        """Why a run makes no such file, a sentence by kind of artifact."""
        data, never = self.data, dict[str, str]()
        if not self.curriculum.uses_ranking:
            never["ranking"] = "No order of the samples is used, so none are ranked."
        if not (data.validation or data.test or data.split or self.evaluation.sets):
            never["answers"] = "No samples are held out, so none are answered."
        return never

    @property
    def model_refs(self) -> dict[str, ModelRef]:
        """All models that are read, by the pointer to each."""
        refs = {"/teacher": self.teacher, "/student": self.student, RANKING_MODEL_POINTER: self.ranking_model}
        return {pointer: ref for pointer, ref in refs.items() if ref is not None}

    def with_ranking_model(self, ref: ModelRef) -> Self:
        """The specification with another reference to the model that ranks."""
        ranking = self.curriculum.ranking
        ranker = ranking.ranker.model_copy(update={"model": ref})
        ranking = ranking.model_copy(update={"ranker": ranker})
        return self.with_fields({"curriculum": {"ranking": ranking}})

    @property
    def data_refs(self) -> dict[str, DataRef]:
        """Every data set that the specification names, by the JSON pointer of its field."""
        parts = {"train": self.data.train, "validation": self.data.validation, "test": self.data.test}
        return {
            **{f"/data/{name}": ref for name, ref in parts.items() if ref is not None},
            **{f"/evaluation/sets/{name}": ref for name, ref in self.evaluation.sets.items()},
        }

    def with_data_refs(self, refs: Mapping[str, DataRef]) -> Self:
        """The specification with these data sets, by the JSON pointers that :attr:`data_refs` has."""
        by_part: dict[str, dict[str, DataRef]] = {"data": {}, "evaluation": {}}
        for pointer, ref in refs.items():
            _, part, *_, name = pointer.split("/")
            by_part[part][name] = ref
        sets = {**self.evaluation.sets, **by_part["evaluation"]}
        return self.with_fields({"data": by_part["data"], "evaluation": {"sets": sets}})

    def with_choices(self, chosen: Mapping[str, Mapping[str, int]]) -> Self:
        """The specification with `chosen`, by part and field, in place of those choices that are null."""
        return self.with_fields(
            {
                part: {field: value for field, value in fields.items() if getattr(getattr(self, part), field) is None}
                for part, fields in chosen.items()
            }
        )

    def without_choices(self, posted: Self) -> Self:
        """The specification with every choice as `posted` has it that the engine made or had to make smaller, and
        without the day where that was left open.
        """
        spec = self if posted.data.date is not None else self.with_fields({"data": {"date": None}})
        return spec.with_fields(
            {
                part: {
                    field: getattr(getattr(posted, part), field)
                    for field in fields
                    if _may_be_chosen(field, getattr(getattr(self, part), field), getattr(getattr(posted, part), field))
                }
                for part, fields in ENGINE_CHOICES.items()
            }
        )

    def with_day(self, day: date) -> Self:
        """The specification with the day that templates are given, where it was left open."""
        return self if self.data.date is not None else self.with_fields({"data": {"date": day}})

    def with_fields(self, fields_by_parts: Mapping[str, Mapping[str, Any]]) -> Self:
        """The specification with other values in these fields, by part; nothing is validated."""
        parts = {part: getattr(self, part).model_copy(update=fields) for part, fields in fields_by_parts.items()}
        return self.model_copy(update=parts)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.teacher is None and self.method.needs_teacher:
            raise ValueError(f"method {self.method.name.value} needs a teacher")
        if self.teacher is None and self.student.from_teacher is not None:
            raise ValueError("student.from_teacher needs a teacher")
        ranking = self.curriculum.ranking
        if self.teacher is None and isinstance(ranking.ranker, TeacherRanker):
            raise ValueError("curriculum.ranking by the teacher needs a teacher")
        if ranking.no_repeat_ngram is not None and self.resources.generator == "vllm":
            raise ValueError(
                "vLLM cannot ban repeated n-grams: leave resources.generator at engine, or set "
                "curriculum.ranking.no_repeat_ngram to null"
            )
        if isinstance(self.curriculum.advance, ByConvergence) and not self.data.has_validation:
            raise ValueError("curriculum.advance by convergence needs data.validation or data.split.validation")
        if self.export.hub is not None and self.export.hub.checkpoint == "best" and not self.data.has_validation:
            raise ValueError("export.hub.checkpoint best needs data.validation or data.split.validation")
        return self


def _may_be_chosen(field: str, pinned: int | None, posted: int | None) -> bool:
    """Whether `pinned` may be what the engine made of `posted`: memory can make every choice smaller but threads."""
    return posted is None or (field != "threads" and pinned is not None and pinned < posted)
