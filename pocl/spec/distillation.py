"""One distillation job, whole."""

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
        if self.teacher is None and self.method.needs_teacher:
            raise ValueError(f"method {self.method.name.value} needs a teacher")
        if self.teacher is None and self.student.from_teacher is not None:
            raise ValueError("student.from_teacher needs a teacher")
        if isinstance(self.curriculum.advance, ByConvergence) and self.data.validation is None:
            raise ValueError("curriculum.advance by convergence needs data.validation")
        return self
