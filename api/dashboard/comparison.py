"""Jobs beside each other: their figures, the curves of each, and where their specifications differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from api.jobs.schemas import EvaluationView, MetricsView


def compare_curves(names: Sequence[str], metrics: Sequence[MetricsView]) -> dict[str, Any]:
    """The charts by name, as :func:`api.dashboard.curves.present_curves` has them, with one line for each job."""
    losses = [
        next((dict(zip(each.steps, each.values, strict=True)) for each in of.series if each.name == "loss"), {})
        for of in metrics
    ]
    scores = [_scores(of.evaluations) for of in metrics]
    return {"bands": [], "loss": _chart(names, losses), "rouge_l": _chart(names, scores)}


def last_scores(evaluations: Sequence[EvaluationView]) -> EvaluationView | None:
    """The scores to compare jobs by: of the final student, else after the last stage; of the test samples if any."""
    for subject in ("final", "stage"):
        found = [each for each in evaluations if each.subject == subject]
        of_test = [each for each in found if each.split == "test"]
        if found:
            return (of_test or found)[-1]
    return None


def specification_differences(specs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The fields in which specifications differ: the pointer of each, and its value in every one; null where it is
    absent.
    """
    flat = [dict(_leaves(spec, "")) for spec in specs]
    pointers = list(dict.fromkeys(pointer for each in flat for pointer in each))
    rows = [(pointer, [each.get(pointer) for each in flat]) for pointer in pointers]
    return [(pointer, values) for pointer, values in rows if any(value != values[0] for value in values)]


def _scores(evaluations: Sequence[EvaluationView]) -> dict[int, float]:
    splits = [each.split for each in evaluations]
    split = "validation" if "validation" in splits else next(iter(splits), "")
    return {
        each.step: each.rouge_l
        for each in evaluations
        if each.split == split and each.subject in ("initial", "epoch", "stage")
    }


def _chart(names: Sequence[str], lines: Sequence[Mapping[int, float]]) -> dict[str, Any]:
    steps = sorted({step for line in lines for step in line})
    series = [
        {"label": name, "values": [line.get(step) for step in steps]}
        for name, line in zip(names, lines, strict=True)
        if line
    ]
    return {"x": steps, "series": series, "levels": []}


def _leaves(value: Any, pointer: str) -> Sequence[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [leaf for name, child in value.items() for leaf in _leaves(child, f"{pointer}/{name}")]
    return [(pointer, value)]
