"""Warnings about the plan of a run: what is valid, and probably not what was meant."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pocl.plan import StagePlan
from pocl.spec import SFT, DistillationSpec, StudentRanker

_SMALL_GRADIENT: Final = 0.3
"""Below this ratio to the gradient of cross-entropy, a KD weight means another mixture than with the KL divergences."""
_SMALL_BATCH: Final = 0.5
"""A last batch below this share of a whole one is small: each of its samples counts more than twice."""
_FEW_STEPS: Final = 20
"""In epochs of at most so many steps a small last batch weighs."""


@dataclass(frozen=True)
class PlanWarning:
    """A warning about a specification that is valid."""

    code: str
    message: str
    pointer: str | None = None
    """The field of the specification that it is about; null where it is about none."""


def plan_warnings(spec: DistillationSpec, table: Sequence[StagePlan]) -> Iterator[PlanWarning]:
    """The warnings about a specification with its stages, which need neither models nor samples."""
    yield from _warmup_warnings(spec, table)
    yield from _last_batch_warnings(spec, table)
    yield from _gradient_warnings(spec, table)
    yield from _ranking_warnings(spec)
    if not spec.data.has_validation:
        message = "Without data.validation or data.split no stage is scored, and none is the best."
        yield PlanWarning("no_validation", message, "/data/validation")


def _warmup_warnings(spec: DistillationSpec, table: Sequence[StagePlan]) -> Iterator[PlanWarning]:
    warmup = spec.training.warmup_steps
    carried = spec.curriculum.optimizer_at_stage == "carry"
    shortest = sum(stage.steps for stage in table) if carried else min(stage.steps for stage in table)
    if warmup >= shortest:
        where = "the whole run has" if carried else "the shortest stage, which has a schedule of its own, has"
        yield PlanWarning(
            "warmup_covers_schedule",
            f"training.warmup_steps is {warmup}, and {where} {shortest} steps: there the rate reaches its peak "
            "with the last step and never falls.",
            "/training/warmup_steps",
        )


def _last_batch_warnings(spec: DistillationSpec, table: Sequence[StagePlan]) -> Iterator[PlanWarning]:
    training = spec.training
    if training.last_batch == "partial":
        for stage in table:
            left = stage.samples % training.batch_size
            if 1 < stage.steps_per_epoch <= _FEW_STEPS and 0 < left < _SMALL_BATCH * training.batch_size:
                yield PlanWarning(
                    "small_last_batch",
                    f"Each epoch of stage {stage.index + 1} ends with a batch of {left} samples instead of "
                    f"{training.batch_size}, whose step is as large as the others: training.last_batch `even` makes "
                    "all batches of an epoch of equal size, `drop` leaves these samples out.",
                    "/training/last_batch",
                )
                return
    if training.last_batch == "drop":
        for stage in table:
            left = stage.samples % training.batch_size
            if stage.samples > training.batch_size and left * 10 > stage.samples:
                yield PlanWarning(
                    "samples_dropped",
                    f"Each epoch of stage {stage.index + 1} leaves out {left} of {stage.samples} samples, at random.",
                    "/training/last_batch",
                )
                return


def _gradient_warnings(spec: DistillationSpec, table: Sequence[StagePlan]) -> Iterator[PlanWarning]:
    method = spec.method
    if isinstance(method, SFT) or method.gradient_ratio is None or method.gradient_ratio >= _SMALL_GRADIENT:
        return
    first = table[0]
    if first.kd_weight == 1:
        return
    mixed = first.kd_weight * method.gradient_ratio / (1 - first.kd_weight)
    yield PlanWarning(
        "divergence_gradient_small",
        f"Where it was measured the gradient of {method.name.value} had {method.gradient_ratio:.2f} times the norm of "
        f"that of cross-entropy at temperature 1 (forward_kl: 0.50). At the KD weight {first.kd_weight:.2f} of stage 0 "
        f"the teacher then has {mixed:.1f} times the pull of the references; a higher kd_weight gives it more.",
        "/curriculum/kd_weight",
    )


def _ranking_warnings(spec: DistillationSpec) -> Iterator[PlanWarning]:
    if not spec.curriculum.uses_ranking:
        message = "No ranking is computed: no stage of this specification takes its samples by difficulty."
        yield PlanWarning("ranking_skipped", message, "/curriculum/ranking")
    elif spec.student.from_teacher is not None and isinstance(spec.curriculum.ranking.ranker, StudentRanker):
        message = (
            "A student that was cut out of its teacher answers almost nothing before it is trained, so that its ranks "
            "are near chance: curriculum.ranking.ranker names another model, such as the teacher."
        )
        yield PlanWarning("ranking_by_cut_student", message, "/curriculum/ranking/ranker")
