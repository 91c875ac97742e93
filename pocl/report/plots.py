"""The plots of a report: small panels of one y-axis each, which stay readable on a telephone."""

import io
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure

from pocl.curriculum.ranking import RankedSample
from pocl.events import DataEncoded, Evaluated
from pocl.report.figures import StageFigures, TrainingCurve
from pocl.report.names import subject_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BANDS = ("#f3f6fa", "#e4ebf4")
_BLUE, _RED, _GREY, _GREEN = "#1f5fa8", "#c2452d", "#7a8794", "#2f7d4f"
_STAGES = ("#c6dbef", "#6baed6", "#2171b5", "#08306b", "#e09a5b", "#c2452d")
"""Of stages, from those whose samples are easy: each darker than the one before."""
_MAX_LABELLED_STAGES = 8
_BINS = 20


def draw_loss(curve: TrainingCurve, stages: Sequence[StageFigures]) -> str:
    """The loss of each optimiser step and its two parts, as SVG."""
    figure, axes = _panel("loss, nats per token")
    _shade(axes, stages)
    axes.plot(curve.steps, curve.loss, color=_BLUE, lw=1.6, label="loss")
    axes.plot(curve.steps, curve.cross_entropy, color=_GREY, lw=1, label="cross-entropy")
    with_teacher = [
        (step, value) for step, value in zip(curve.steps, curve.divergence, strict=True) if value is not None
    ]
    if with_teacher:
        axes.plot(*zip(*with_teacher, strict=True), color=_GREEN, lw=1, label="divergence")
    axes.set(xlabel="optimiser step", ylim=(0, None))
    axes.legend(loc="best", frameon=False, fontsize=8)
    return _svg(figure)


def draw_temperature(curve: TrainingCurve, stages: Sequence[StageFigures]) -> str:
    """The temperature of each optimiser step, as SVG."""
    figure, axes = _panel("temperature of the distillation")
    _shade(axes, stages)
    axes.step(curve.steps, curve.temperature, where="mid", color=_RED, lw=1.6)
    axes.set(xlabel="optimiser step", ylim=(0, max(curve.temperature, default=1) * 1.25))
    return _svg(figure)


def draw_rouge_l(evaluations: Sequence[Evaluated]) -> str:
    """ROUGE-L of the student before training and after each stage, and that of the teacher, as SVG."""
    figure, axes = _panel("ROUGE-L, points (more is better)")
    scored = _scored(evaluations)
    places = list(range(len(scored)))
    axes.plot(places, [each.rouge_l for each in scored], color=_BLUE, marker="o", label="student")
    _plot_sampled(axes, scored)
    for each in evaluations:
        if each.subject == "teacher":
            axes.axhline(each.rouge_l, color=_GREY, ls="--", lw=1.2, label="teacher")
    axes.set(ylim=(0, None))
    _label_subjects(axes, scored)
    return _svg(figure)


def draw_cross_entropy(evaluations: Sequence[Evaluated]) -> str:
    """Cross-entropy on the references, likewise. The axis does not begin at 0: a rise between late stages shows."""
    figure, axes = _panel("cross-entropy, nats per token (less is better)")
    scored = _scored(evaluations)
    axes.plot(range(len(scored)), [each.cross_entropy for each in scored], color=_RED, marker="s", label="student")
    for each in evaluations:
        if each.subject == "teacher":
            axes.axhline(each.cross_entropy, color=_GREY, ls="--", lw=1.2, label="teacher")
    _label_subjects(axes, scored)
    return _svg(figure)


def draw_lengths(data: Sequence[DataEncoded]) -> str:
    """The shares of the samples of each data set by their length before any cut, as SVG."""
    figure, axes = _panel("samples, per cent", wide=True)
    buckets = sorted({bucket for each in data for bucket in each.counts.lengths})
    width = 0.8 / len(data)
    for index, (each, color) in enumerate(zip(data, cycle((_BLUE, _RED, _GREEN, _GREY)), strict=False)):
        shares = [100 * each.counts.lengths.get(bucket, 0) / max(1, each.counts.rows) for bucket in buckets]
        places = [place + (index - (len(data) - 1) / 2) * width for place in range(len(buckets))]
        axes.bar(places, shares, width, color=color, label=each.part)
    axes.set_xticks(range(len(buckets)), [f"≤ {bucket}" for bucket in buckets])
    axes.set(xlabel="tokens before any cut")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def draw_difficulty(order: Sequence[RankedSample], stages: Sequence[StageFigures]) -> list[str]:
    """How many samples have which value of each measure, in the colour of the stage that first trains on them, as SVG.

    Args:
        order: the samples as stages take them; no plot where one of them was not measured.
    """
    if not order or any(each.cross_entropy is None for each in order):
        return []
    parts: list[Sequence[RankedSample]] = []
    first = 0
    for stage in stages:
        parts.append(order[first : stage.samples])
        first = max(first, stage.samples)
    labels = [f"first in stage {stage.index + 1}" for stage in stages]
    colors = [_STAGES[min(stage.index, len(_STAGES) - 1)] for stage in stages]
    plots = []
    for title, values in (
        ("cross-entropy of the reference, nats per token", [[each.cross_entropy or 0.0 for each in p] for p in parts]),
        ("ROUGE-L of the answer, points", [[each.rouge_l or 0.0 for each in part] for part in parts]),
    ):
        figure, axes = _panel("samples")
        # Scores that are all 0 would be drawn around it, below 0 too.
        lowest = min(map(min, filter(None, values)))
        highest = max(map(max, filter(None, values)))
        axes.hist(
            values, bins=_BINS, range=(lowest, max(highest, lowest + 1)), stacked=True, color=colors, label=labels
        )
        axes.set(xlabel=title)
        axes.legend(frameon=False, fontsize=8)
        plots.append(_svg(figure))
    return plots


def _scored(evaluations: Sequence[Evaluated]) -> list[Evaluated]:
    return [each for each in evaluations if each.subject in ("initial", "stage")]


def _plot_sampled(axes: "Axes", scored: Sequence[Evaluated]) -> None:
    sampled = [(place, each.sampled.rouge_l) for place, each in enumerate(scored) if each.sampled is not None]
    if sampled:
        places, stats = zip(*sampled, strict=True)
        means, deviations = [each.mean for each in stats], [each.sd or 0.0 for each in stats]
        axes.errorbar(places, means, yerr=deviations, color=_GREEN, marker="^", capsize=4, label="sampled, ± sd")


def _label_subjects(axes: "Axes", scored: Sequence[Evaluated]) -> None:
    if len(scored) <= _MAX_LABELLED_STAGES:
        names = [subject_name(each).removesuffix(" student").removeprefix("after ") for each in scored]
        axes.set_xticks(range(len(scored)), names, fontsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _panel(title: str, *, wide: bool = False) -> tuple[Figure, "Axes"]:
    figure = Figure(figsize=(9.4 if wide else 4.6, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(8)
    return figure, axes


def _shade(axes: "Axes", stages: Sequence[StageFigures]) -> None:
    """A band for each stage, with its number where there is room."""
    for stage in stages:
        start = stage.end_step - stage.steps
        axes.axvspan(start + 0.5, stage.end_step + 0.5, color=_BANDS[stage.index % len(_BANDS)], lw=0)
        if len(stages) <= _MAX_LABELLED_STAGES:
            middle = (start + stage.end_step) / 2 + 0.5
            label = f"stage {stage.index + 1}" if len(stages) <= _MAX_LABELLED_STAGES // 2 else str(stage.index + 1)
            axes.text(middle, 0.02, label, transform=axes.get_xaxis_transform(), ha="center", fontsize=7, color=_GREY)


def _svg(figure: Figure) -> str:
    # With a fixed salt and no date the same run gives the same bytes.
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "pocl", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
