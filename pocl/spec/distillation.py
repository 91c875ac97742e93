"""One distillation job, whole."""

import hashlib
from typing import Literal, Self

from pydantic import Field, model_validator

from pocl.spec.curriculum import ByConvergence, Curriculum
from pocl.spec.data import Data
from pocl.spec.frozen import FrozenModel
from pocl.spec.methods import ForwardKL, Method
from pocl.spec.models import ModelRef, StudentRef
from pocl.spec.training import Checkpoints, Evaluation, Resources, Training

PresetName = Literal["paper", "pocl_official", "quick"]


class DistillationSpec(FrozenModel):
    """One distillation job."""

    preset: PresetName = "paper"
    """The defaults of all other fields: `paper`, `pocl_official` (the published code's loss scaling) or `quick`."""
    teacher: ModelRef | None = None
    """The model to learn from. Every method but `sft` needs one; with `sft` the student is only compared with it."""
    student: StudentRef
    """The model to train."""
    data: Data
    """The samples that are trained and evaluated on."""
    method: Method = ForwardKL()
    """The divergence that is minimised: the name of a method, or an object with its parameters."""
    curriculum: Curriculum = Curriculum()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()
    resources: Resources = Resources()
    seed: int = Field(default=10, ge=0, lt=2**31)
    """The seed of shuffling and dropout: equal seeds give equal weights on one machine."""

    @property
    def recipe_digest(self) -> str:
        """SHA-256 over what shapes the training of a stage: method, curriculum and training.

        Choices that the engine pins for a machine, and paths that differ between machines, have no part in it.
        """
        training = self.training.model_copy(update={"micro_batch_size": None})
        parts = (self.method, self.curriculum, training)
        return hashlib.sha256("".join(part.model_dump_json() for part in parts).encode()).hexdigest()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.teacher is None and self.method.needs_teacher:
            raise ValueError(f"method {self.method.name.value} needs a teacher")
        if self.teacher is None and self.student.from_teacher is not None:
            raise ValueError("student.from_teacher needs a teacher")
        if isinstance(self.curriculum.advance, ByConvergence) and self.data.validation is None:
            raise ValueError("curriculum.advance by convergence needs data.validation")
        return self
