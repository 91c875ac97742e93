"""What the charts of a job draw: its loss and its scores over the optimiser steps, with the stages as bands."""

from collections.abc import Sequence
from typing import Any, Final

from api.jobs.schemas import EvaluationView, MetricsView, StageView

_LOSS_LABELS: Final = {"loss": "loss", "cross_entropy": "cross-entropy", "divergence": "divergence from the teacher"}


def present_curves(metrics: MetricsView, stages: Sequence[StageView]) -> dict[str, Any]:
    """The charts by name, each with one axis: `x` has the steps, `series` a value or null for each of them, and
    `levels` what is the same at every step.
    """
    return {
        "bands": [
            {"label": f"stage {stage.index + 1}", "from": stage.first_step, "to": stage.first_step + stage.steps}
            for stage in stages
        ],
        "loss": _loss(metrics),
        "rouge_l": _scores(metrics.evaluations, "rouge_l"),
        "cross_entropy": _scores(metrics.evaluations, "cross_entropy"),
    }


def _loss(metrics: MetricsView) -> dict[str, Any]:
    series = [each for each in metrics.series if each.name in _LOSS_LABELS]
    steps = sorted({step for each in series for step in each.steps})
    values = [(each.name, dict(zip(each.steps, each.values, strict=True))) for each in series]
    order = list(_LOSS_LABELS)
    return {
        "x": steps,
        "series": [
            {"label": _LOSS_LABELS[name], "values": [at.get(step) for step in steps]}
            for name, at in sorted(values, key=lambda each: order.index(each[0]))
        ],
        "levels": [],
    }


def _scores(evaluations: Sequence[EvaluationView], metric: str) -> dict[str, Any]:
    """The scores of the student on the samples that the stages are scored on, and the teacher's as a level."""
    splits = list(dict.fromkeys(each.split for each in evaluations))
    split = "validation" if "validation" in splits else (splits[0] if splits else "")
    scored = [each for each in evaluations if each.split == split and each.subject in ("initial", "epoch", "stage")]
    by_step = {each.step: getattr(each, metric) for each in scored}
    teacher = next((each for each in evaluations if each.split == split and each.subject == "teacher"), None)
    levels = [] if teacher is None else [{"label": "teacher", "value": getattr(teacher, metric)}]
    steps = sorted(by_step)
    series = [{"label": "student", "values": [by_step[step] for step in steps]}] if steps else []
    return {"x": steps, "series": series, "levels": levels}
