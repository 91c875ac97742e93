"""The training objective: the one definition of temperature, tau squared, KD weight and shared vocabulary.

    loss = (1 - w) CE + w s D(p, q),   p = softmax(teacher logits / tau),   q = softmax(student logits / tau)

w is the KD weight, D the divergence of the method, and s = tau^2 where the method asks for it (Hinton et al. 2015,
section 2: gradients of the divergence shrink as 1 / tau^2), else 1. CE is the cross-entropy of the labels at
temperature 1 over the student's whole vocabulary; D is over the ids that both models share.

:mod:`pocl.losses.dense` computes the objective from full logits and is the reference; :mod:`pocl.losses.fused` computes
it from hidden states. Both give sums over tokens, never means, so that micro-batches of any size add up to the same
gradient: :mod:`pocl.train.accumulation` multiplies by 1 / (valid tokens of the whole optimiser step).
"""

import math
from dataclasses import dataclass

from pocl.spec import DistillationMethod


@dataclass(frozen=True)
class ObjectiveTerms:
    """What the objective is made of, apart from models and tokens."""

    method: DistillationMethod
    """The divergence D and its parameters."""
    temperature: float
    """tau of teacher and student, above 0."""
    kd_weight: float
    """w, from 0 to 1."""
    shared_vocabulary: int | None
    """Both vocabularies are cut to this many ids before the softmax of the divergence; None where they are equally
    wide."""

    def check(self) -> None:
        """Refuse numbers that no objective has.

        Raises:
            ValueError: unless the temperature is finite and above 0 and the KD weight lies between 0 and 1.
        """
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError("temperature must be finite and above 0")
        if not 0 <= self.kd_weight <= 1:
            raise ValueError("kd_weight must lie between 0 and 1")

    def tau_factor(self) -> float:
        """s, the factor of the divergence: tau squared where the method asks for it, else 1."""
        return self.temperature**2 if self.method.scale_by_tau_squared else 1.0

    def shared_width(self, student_vocabulary: int, teacher_vocabulary: int) -> int:
        """How many ids the divergence is over, given the sizes of both vocabularies.

        Raises:
            ValueError: if the sizes differ and `shared_vocabulary` is None, or if there are not so many ids.
        """
        smaller = min(student_vocabulary, teacher_vocabulary)
        if self.shared_vocabulary is None:
            if student_vocabulary != teacher_vocabulary:
                raise ValueError("the vocabularies differ in size: give shared_vocabulary")
            return smaller
        if not 1 <= self.shared_vocabulary <= smaller:
            raise ValueError(f"shared_vocabulary must lie between 1 and {smaller}")
        return self.shared_vocabulary
