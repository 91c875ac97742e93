"""Knowledge-distillation methods and the parameters of each."""

from collections.abc import Mapping
from enum import StrEnum
from inspect import cleandoc
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from pocl.spec.frozen import FrozenModel


class KDMethod(StrEnum):
    SFT = "sft"
    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JS = "js"
    TVD = "tvd"
    SKEW_FORWARD_KL = "skew_forward_kl"
    SKEW_REVERSE_KL = "skew_reverse_kl"
    ADAPTIVE_KL = "adaptive_kl"
    ALPHA_BETA = "alpha_beta"


class _Distillation(FrozenModel):
    published: ClassVar[Mapping[str, Any]] = {}
    """The published code's values where they differ from the defaults; empty where it has the defaults or lacks the
    method."""
    gradient_ratio: ClassVar[float | None] = None
    """The norm of the gradient of D over that of cross-entropy, on the logits, at temperature 1, where it was measured
    (SmolLM2-135M and a student cut out of it, on Dolly): it says what a `kd_weight` of this method means."""

    scale_by_tau_squared: bool = True
    """Multiply the divergence by temperature squared, which keeps its gradient of one size (Hinton et al. 2015)."""

    @property
    def needs_teacher(self) -> Literal[True]:
        """Whether the objective compares the student with a teacher."""
        return True


class SFT(FrozenModel):
    """Cross-entropy on the reference responses; the teacher is not run."""

    published: ClassVar[Mapping[str, Any]] = {}

    name: Literal[KDMethod.SFT] = KDMethod.SFT

    @property
    def needs_teacher(self) -> Literal[False]:
        """Whether the objective compares the student with a teacher."""
        return False


class ForwardKL(_Distillation):
    """KL(p‖q), p the teacher, q the student: the student covers all that the teacher finds likely."""

    gradient_ratio: ClassVar[float | None] = 0.50

    name: Literal[KDMethod.FORWARD_KL] = KDMethod.FORWARD_KL


class ReverseKL(_Distillation):
    """KL(q‖p): the student keeps to what the teacher finds likely."""

    published: ClassVar[Mapping[str, Any]] = {"scale_by_tau_squared": False}
    gradient_ratio: ClassVar[float | None] = 0.85

    name: Literal[KDMethod.REVERSE_KL] = KDMethod.REVERSE_KL


class JS(_Distillation):
    """Generalised Jensen-Shannon: beta KL(p‖m) + (1-beta) KL(q‖m), m = beta p + (1-beta) q (GKD, eq. 1)."""

    published: ClassVar[Mapping[str, Any]] = {"beta": 0.1}
    gradient_ratio: ClassVar[float | None] = 0.08

    name: Literal[KDMethod.JS] = KDMethod.JS
    beta: float = Field(default=0.5, gt=0, lt=1)
    """The weight of the teacher in the mixture; its limits 0 and 1 are `forward_kl` and `reverse_kl`."""


class TVD(_Distillation):
    """Total variation distance, half the sum of |p-q|."""

    published: ClassVar[Mapping[str, Any]] = {"scale_by_tau_squared": False}
    gradient_ratio: ClassVar[float | None] = 0.19

    name: Literal[KDMethod.TVD] = KDMethod.TVD


class SkewForwardKL(_Distillation):
    """KL(p ‖ alpha p + (1-alpha) q) (DistiLLM)."""

    published: ClassVar[Mapping[str, Any]] = {"scale_by_tau_squared": False}
    gradient_ratio: ClassVar[float | None] = 0.27

    name: Literal[KDMethod.SKEW_FORWARD_KL] = KDMethod.SKEW_FORWARD_KL
    alpha: float = Field(default=0.1, ge=0, lt=1)
    """The share of the other distribution in the mixture; 0 is no mixture."""


class SkewReverseKL(_Distillation):
    """KL(q ‖ (1-alpha) p + alpha q) (DistiLLM)."""

    gradient_ratio: ClassVar[float | None] = 0.27

    name: Literal[KDMethod.SKEW_REVERSE_KL] = KDMethod.SKEW_REVERSE_KL
    alpha: float = Field(default=0.1, ge=0, lt=1)
    """The share of the other distribution in the mixture; 0 is no mixture."""


class AdaptiveKL(_Distillation):
    """Forward and reverse KL, weighted by the gap |p-q| on the teacher's likeliest tokens and on the rest (AKL)."""

    name: Literal[KDMethod.ADAPTIVE_KL] = KDMethod.ADAPTIVE_KL
    head_mass: float = Field(default=0.5, gt=0, lt=1)
    """The probability mass of the teacher's head: its likeliest tokens, until together they have this mass."""


class AlphaBeta(_Distillation):
    """Alpha-beta divergence (ABKD). At (1, 0) it is `forward_kl`, at (0, 1) `reverse_kl`."""

    name: Literal[KDMethod.ALPHA_BETA] = KDMethod.ALPHA_BETA
    alpha: float = Field(default=0.2, ge=0, le=1)
    """The exponent of the teacher; 0 is the exact limit, and between 0 and 0.001 single precision loses digits."""
    beta: float = Field(default=0.7, ge=0, le=1)
    """The exponent of the student; 0 as for `alpha`."""


DistillationMethod = ForwardKL | ReverseKL | JS | TVD | SkewForwardKL | SkewReverseKL | AdaptiveKL | AlphaBeta
"""The methods that need a teacher."""
Method = Annotated[SFT | DistillationMethod, Field(discriminator="name")]
METHODS: dict[KDMethod, type[Method]] = {
    method.model_fields["name"].default: method for method in (SFT, *get_args(DistillationMethod))
}


def describe_method(method: type[Method]) -> str:
    """What a method minimises, and how large its gradient is beside that of cross-entropy where that was measured."""
    text = cleandoc(method.__doc__ or "")
    ratio = None if issubclass(method, SFT) else method.gradient_ratio
    if ratio is None:
        return text
    measured = (
        f"Where it was measured its gradient had {ratio:.2f} times the norm of that of cross-entropy at temperature 1."
    )
    return f"{text}\n\n{measured}"
