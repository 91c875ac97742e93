"""The share of a job's work that is done, and the time that is left: figures over all phases, each as long as its
planned operations.

The plan is cut into parts in the order of a run: ranking, the teacher's evaluation on each set of samples, its hidden
states, the untrained student's evaluation on each set, and training, over whose steps the evaluations of stages are
spread. What a run finds in a cache, and what a later attempt need not do again, is passed over at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from pocl.estimate import Estimate, ModelPass


@dataclass(frozen=True)
class PlannedPart:
    """A part of the work of a job."""

    phase: str
    """`ranking`, `evaluating`, `caching_teacher` or `training`, as the engine's events name them."""
    until: float
    """The share of all work that is done when the part ends, 0 to 1."""
    subject: str | None = None
    """What is evaluated, `teacher` or `initial`; null in other phases."""
    samples: str | None = None
    """On which samples it is evaluated; null in other phases."""


@dataclass(frozen=True)
class TimeLeft:
    """The time to the end of a job in seconds, as its forecast has it."""

    low: float
    expected: float
    high: float


_MEASURED_PERCENT: Final = 5.0
"""The share of a job after which the time that it took tells the speed of the rest."""
_ASSUMED: Final = (
    PlannedPart("ranking", 0.1),
    PlannedPart("evaluating", 0.15, "teacher"),
    PlannedPart("caching_teacher", 0.2),
    PlannedPart("evaluating", 0.25, "initial"),
    PlannedPart("training", 1),
)
"""The parts of a job whose models' files are not at hand."""
_BY_STEPS: Final = (PlannedPart("training", 1),)


class WorkPlan:
    """The parts of a job's work in their order.

    Args:
        parts: with rising ends, the last of which is the training and ends at 1.
    """

    def __init__(self, parts: Sequence[PlannedPart]) -> None:
        self._parts = tuple(parts)

    @classmethod
    def from_estimate(cls, estimate: Estimate | None) -> "WorkPlan":
        """The plan by the operations of an estimate, by its tokens where those of a model are not known, and by assumed
        shares without one.
        """
        if estimate is None:
            return cls(_ASSUMED)
        by_flops = estimate.flops is not None
        weighed = dict.fromkeys(_order(estimate.passes), 0.0)
        for each in estimate.passes:
            weighed[_key(each)] += float(each.flops or 0) if by_flops else float(each.tokens)
        total, done, parts = sum(weighed.values()), 0.0, []
        for (phase, subject, samples), weight in weighed.items():
            done += weight / total if total else 0.0
            parts.append(PlannedPart(phase, 1.0 if phase == "training" else min(1.0, done), subject, samples))
        return cls(parts)

    @classmethod
    def from_stored(cls, forecast: dict[str, Any] | None) -> "WorkPlan":
        """The plan that :meth:`as_stored` made, out of the row's forecast; of steps alone for a job without one."""
        stored = (forecast or {}).get("work")
        return cls([PlannedPart(**each) for each in stored] if stored else _BY_STEPS)

    def as_stored(self) -> list[dict[str, Any]]:
        """The plan as the row of the job keeps it."""
        return [asdict(part) for part in self._parts]

    def at_step(self, step: int, total_steps: int) -> float:
        """Per cent of the work that is done after so many optimiser steps."""
        if not total_steps or step <= 0:
            return 0.0
        # Convergence ends stages early, so the last step may come before the planned total.
        start = self._start_of(len(self._parts) - 1)
        return 100.0 * (start + (1 - start) * min(1.0, step / total_steps))

    def within(self, percent: float, phase: str, done: int, total: int) -> float:
        """Per cent of the work that is done when a phase before training has come so far.

        Args:
            percent: what was done before; the phase is at its first part that ends beyond.
        """
        for index, part in enumerate(self._parts[:-1]):
            if part.phase == phase and 100.0 * part.until > percent:
                start = self._start_of(index)
                share = min(1.0, done / total) if total > 0 else 0.0
                return max(percent, 100.0 * (start + (part.until - start) * share))
        return percent

    def after_evaluation(self, percent: float, subject: str, samples: str) -> float:
        """Per cent of the work that is done once the teacher or the untrained student has been evaluated.

        Args:
            percent: what was done before.
        """
        ends = [each.until for each in self._parts if each.subject == subject and each.samples in (samples, None)]
        return max(percent, *(100.0 * end for end in ends)) if ends else percent

    def _start_of(self, index: int) -> float:
        return self._parts[index - 1].until if index else 0.0


def forecast_time_left(
    forecast: dict[str, Any] | None, percent: float, elapsed: float | None = None
) -> TimeLeft | None:
    """The time that is left of a job of which so many per cent are done, until the engine measures its steps.

    Args:
        forecast: as the row of the job keeps it.
        elapsed: the seconds that these per cent took. Within the range of the forecast they say more than it does, once
            they are more than a few; null where they are not known, as of several attempts.

    Returns:
        null where the forecast names no duration.
    """
    duration = (forecast or {}).get("duration")
    if duration is None:
        return None
    low, expected, high = (float(duration[f"{name}_seconds"]) for name in ("low", "expected", "high"))
    if elapsed is not None and percent >= _MEASURED_PERCENT:
        expected = min(high, max(low, 100 * elapsed / percent))
    share = max(0.0, 1 - percent / 100)
    return TimeLeft(share * low, share * expected, share * high)


_Key = tuple[str, str | None, str | None]


def _key(each: ModelPass) -> _Key:
    """The part of the plan that a pass belongs to."""
    if each.phase == "evaluating" and each.subject in ("teacher", "initial"):
        return ("evaluating", each.subject, each.part)
    return ("training" if each.phase == "evaluating" else each.phase, None, None)


def _order(passes: Iterable[ModelPass]) -> list[_Key]:
    """The parts of these passes in the order of a run."""
    found = dict.fromkeys(_key(each) for each in passes)
    places = {("ranking", None): 0, ("evaluating", "teacher"): 1, ("caching_teacher", None): 2}
    places |= {("evaluating", "initial"): 3, ("training", None): 4}
    return sorted({**found, ("training", None, None): None}, key=lambda key: places[key[:2]])
