"""The HTML report of a run: one file with its plots inside, nothing to fetch."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from pocl.curriculum.difficulty import RankedSample
from pocl.events import Evaluated, SeedStats
from pocl.layout import REPORT_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BANDS = ("#eef4fb", "#dce8f6", "#cadcf1", "#b8d0ec")
_BLUE, _RED, _GREY, _GREEN = "#1f5fa8", "#c2452d", "#7a8794", "#2f7d4f"


class StageFigures(BaseModel):
    """A stage as it was run."""

    model_config = ConfigDict(frozen=True)

    index: int
    samples: int
    temperature: float
    kd_weight: float
    steps: int
    end_step: int
    """Optimiser steps of the run at its end."""


@dataclass(frozen=True)
class TrainingCurve:
    """The training steps, one entry a step in each sequence."""

    steps: Sequence[int]
    loss: Sequence[float]
    cross_entropy: Sequence[float]
    divergence: Sequence[float | None]
    temperature: Sequence[float]


@dataclass(frozen=True)
class ReportData:
    method: str
    samples: int
    tokens_seen: int
    stages: Sequence[StageFigures]
    evaluations: Sequence[Evaluated]
    curve: TrainingCurve
    ranking: Sequence[RankedSample]
    record: Mapping[str, str | None]
    """Facts that reproduce the run: digests, versions, seed."""


def render(data: ReportData) -> str:
    """The report as one HTML document."""
    environment = Environment(
        loader=PackageLoader("pocl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stage_scores = [each for each in data.evaluations if each.subject in ("initial", "stage")]
    return environment.get_template(REPORT_FILE).render(
        method=data.method,
        samples=data.samples,
        steps=data.stages[-1].end_step if data.stages else 0,
        tokens_seen=data.tokens_seen,
        stages=data.stages,
        evaluations=data.evaluations,
        sampled=next((each.sampled for each in data.evaluations if each.sampled is not None), None),
        name_of=subject_name,
        spread=seed_stats_text,
        training_plot=_training_plot(data),
        scores_plot=_scores_plot(data.evaluations, stage_scores) if stage_scores else "",
        difficulty_plot=_difficulty_plot(data.ranking, data.stages),
        record=data.record,
    )


def subject_name(evaluated: Evaluated) -> str:
    """How people call what was scored."""
    if evaluated.subject == "stage" and evaluated.stage is not None:
        return f"after stage {evaluated.stage + 1}"
    return {"teacher": "teacher", "initial": "untrained student", "final": "final student"}.get(
        evaluated.subject, evaluated.subject
    )


def seed_stats_text(spread: SeedStats) -> str:
    """Mean ± sample standard deviation, the mean alone where one seed leaves no deviation."""
    return f"{spread.mean:.2f}" if spread.sd is None else f"{spread.mean:.2f} ± {spread.sd:.2f}"


def _training_plot(data: ReportData) -> str:
    figure, axes = _figure()
    _shade(axes, data.stages)
    curve = data.curve
    axes.plot(curve.steps, curve.loss, color=_BLUE, lw=1.6, label="loss")
    axes.plot(curve.steps, curve.cross_entropy, color=_GREY, lw=1, label="cross-entropy")
    with_teacher = [
        (step, value) for step, value in zip(curve.steps, curve.divergence, strict=True) if value is not None
    ]
    if with_teacher:
        axes.plot(*zip(*with_teacher, strict=True), color=_GREEN, lw=1, label="divergence")
    axes.set(xlabel="optimiser step", ylabel="nats per token", ylim=(0, None))
    temperature = axes.twinx()
    temperature.step(curve.steps, curve.temperature, where="mid", color=_RED, lw=1.4, ls="--", label="temperature")
    temperature.set(ylabel="temperature", ylim=(0, max(curve.temperature, default=1) * 1.25))
    handles, labels = axes.get_legend_handles_labels()
    more_handles, more_labels = temperature.get_legend_handles_labels()
    axes.legend(handles + more_handles, labels + more_labels, loc="upper right", frameon=False, ncols=4)
    return _svg(figure)


def _scores_plot(evaluations: Sequence[Evaluated], scored: Sequence[Evaluated]) -> str:
    figure, axes = _figure()
    places = list(range(len(scored)))
    axes.plot(places, [each.rouge_l for each in scored], color=_BLUE, marker="o", label="ROUGE-L of the student")
    _plot_sampled(axes, scored)
    for each in evaluations:
        if each.subject == "teacher":
            axes.axhline(each.rouge_l, color=_BLUE, ls=":", lw=1.2, label="ROUGE-L of the teacher")
    axes.set(ylabel="ROUGE-L", ylim=(0, None))
    axes.set_xticks(places, [subject_name(each) for each in scored])
    entropy = axes.twinx()
    entropy.plot(
        places, [each.cross_entropy for each in scored], color=_RED, marker="s", ls="--", label="cross-entropy"
    )
    entropy.set(ylabel="cross-entropy, nats per token", ylim=(0, None))
    handles, labels = axes.get_legend_handles_labels()
    more_handles, more_labels = entropy.get_legend_handles_labels()
    axes.legend(handles + more_handles, labels + more_labels, loc="lower right", frameon=False)
    return _svg(figure)


def _plot_sampled(axes: "Axes", scored: Sequence[Evaluated]) -> None:
    drawn = [(place, each.sampled.rouge_l) for place, each in enumerate(scored) if each.sampled is not None]
    if drawn:
        places, spreads = zip(*drawn, strict=True)
        means, deviations = [each.mean for each in spreads], [each.sd or 0.0 for each in spreads]
        axes.errorbar(places, means, yerr=deviations, color=_GREEN, marker="^", capsize=4, label="sampled, ± sd")


def _difficulty_plot(ranking: Sequence[RankedSample], stages: Sequence[StageFigures]) -> str:
    figure, axes = _figure()
    before = 0
    shades = [_BLUE, "#4f8fce", "#e09a5b", _RED]
    for stage in stages:
        fresh = ranking[before : stage.samples]
        axes.scatter(
            [each.cross_entropy for each in fresh],
            [each.rouge_l for each in fresh],
            s=14,
            color=shades[min(stage.index, len(shades) - 1)],
            alpha=0.75,
            label=f"stage {stage.index + 1}",
        )
        before = max(before, stage.samples)
    axes.set(xlabel="cross-entropy of the reference, nats per token", ylabel="ROUGE-L of the own answer")
    axes.legend(frameon=False, ncols=4)
    return _svg(figure)


def _figure() -> tuple[Figure, "Axes"]:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top"]].set_visible(False)
    return figure, axes


def _shade(axes: "Axes", stages: Sequence[StageFigures]) -> None:
    for stage in stages:
        start = stage.end_step - stage.steps
        axes.axvspan(start + 0.5, stage.end_step + 0.5, color=_BANDS[stage.index % len(_BANDS)], lw=0)


def _svg(figure: Figure) -> str:
    # A fixed salt and no date: the same run gives the same bytes.
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "pocl", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
