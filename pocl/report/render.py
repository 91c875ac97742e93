"""The HTML report of a run: one self-contained file with its plots inside."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from pocl.curriculum.ranking import RankedSample
from pocl.evaluation.intervals import ScoreDifference
from pocl.events import DataEncoded, Evaluated, SeedStats
from pocl.layout import REPORT_FILE
from pocl.report.comparison import ComparedAnswers
from pocl.spec import Control, Method, Ranker, ReversedOrder, describe_control, describe_ranker, method_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MODEL_NAMES = {
    "teacher": "teacher",
    "initial": "untrained student",
    "best": "best student",
    "final": "final student",
}
_METRIC_NAMES = {
    "rouge_l": "ROUGE-L, points",
    "exact_match": "exact match, points",
    "cross_entropy": "cross-entropy, nats per token (less is better)",
}
_BANDS = ("#eef4fb", "#dce8f6", "#cadcf1", "#b8d0ec")
_BLUE, _RED, _GREY, _GREEN = "#1f5fa8", "#c2452d", "#7a8794", "#2f7d4f"


class StageFigures(BaseModel):
    """A stage as it was trained."""

    model_config = ConfigDict(frozen=True)

    index: int
    samples: int
    temperature: float
    kd_weight: float
    method: Method
    inherited: bool
    """Whether another run trained it with another specification, and this run began with its weights: a branch."""
    steps: int
    end_step: int
    """Optimiser steps of the run at its end."""
    kept_epoch: int | None = None
    """How many of its epochs its weights were trained for, where they are those of its best epoch."""


@dataclass(frozen=True)
class TrainingCurve:
    """The optimiser steps; each sequence has one entry for each step."""

    steps: Sequence[int]
    loss: Sequence[float]
    cross_entropy: Sequence[float]
    divergence: Sequence[float | None]
    temperature: Sequence[float]


@dataclass(frozen=True)
class ReportData:
    """All that the report shows."""

    samples: int
    control: Control | None
    tokens_seen: int
    stages: Sequence[StageFigures]
    evaluations: Sequence[Evaluated]
    curve: TrainingCurve
    ranking: Sequence[RankedSample]
    """From easy to hard; empty where nothing was ranked."""
    ranker: Ranker
    """The model that the samples were ranked by, where they were."""
    provenance: Mapping[str, str | None]
    """What the run can be reproduced from: digests, versions, seed."""
    differences: Sequence[ScoreDifference] = ()
    """By how much the trained student scores above the others."""
    answers: Sequence[ComparedAnswers] = ()
    """Answers of all models to the first samples of each set."""
    not_exact: Sequence[str] = ()
    """Why the run may end in other bits when it is repeated or resumed."""
    data: Sequence[DataEncoded] = ()
    """What was cut and left out of each data set."""
    validation_ends_stages: bool = False
    """Whether stages ended by the scores on the validation samples."""


def render(data: ReportData) -> str:
    """The report as one HTML document."""
    environment = Environment(
        loader=PackageLoader("pocl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    splits: dict[str, list[Evaluated]] = {}
    for each in data.evaluations:
        splits.setdefault(each.split, []).append(each)
    # The validation samples come first, where there are any: each stage is scored on them.
    plotted = next(iter(splits.values()), [])
    stage_scores = [each for each in plotted if each.subject in ("initial", "stage")]
    return environment.get_template(REPORT_FILE).render(
        headline=describe_stages(data.stages),
        control=describe_control(data.control),
        method_name=method_name,
        samples=data.samples,
        steps=data.stages[-1].end_step if data.stages else 0,
        tokens_seen=data.tokens_seen,
        stages=data.stages,
        splits=splits,
        differences=data.differences,
        metric_name=_METRIC_NAMES.__getitem__,
        answers=data.answers,
        sampled=next((each.sampled for each in data.evaluations if each.sampled is not None), None),
        subject_name=subject_name,
        model_name=model_name,
        seed_stats=seed_stats_text,
        split_note=lambda split: split_note(split, stages=len(data.stages), ends_stages=data.validation_ends_stages),
        training_plot=_training_plot(data),
        scores_plot=_scores_plot(plotted, stage_scores) if stage_scores else "",
        difficulty_plot=_difficulty_plot(data.ranking, data.stages, data.control),
        ranker=describe_ranker(data.ranker),
        data=data.data,
        data_rows=data_rows(data.data),
        lengths_plot=_lengths_plot(data.data) if data.data else "",
        provenance=data.provenance,
        not_exact=data.not_exact,
    )


def data_rows(data: Sequence[DataEncoded]) -> Sequence[tuple[str, Sequence[int]]]:
    """The table of the data sets: what was counted, and how much of it in each data set; without lines of zeros."""
    labels = {
        "rows": "samples",
        "tokens": "tokens",
        "rows_too_long": "samples of which something was cut",
        "tokens_cut": "tokens cut",
        "prompts_cut": "prompts cut",
        "turns_dropped": "earlier turns dropped",
        "answers_cut": "answers cut",
        "ends_lost": "answers without their end",
        "turns_unlabelled": "earlier answers that are not trained on",
        "ends_added": "answers whose end the template does not write",
        "tokenised_apart": "answers tokenised apart from their prompts",
    }
    rows = [(label, [getattr(each.counts, name) for each in data]) for name, label in labels.items()]
    for name in sorted({name for each in data for name in each.counts.left_out}):
        rows.append((f"left out by the template: {name}", [each.counts.left_out.get(name, 0) for each in data]))
    return [row for row in rows if any(row[1])]


def describe_stages(stages: Sequence[StageFigures]) -> str:
    """Which method trained the stages, and which stages were inherited."""
    total = f"{len(stages)} stage{'s' if len(stages) != 1 else ''}"
    own = [stage for stage in stages if not stage.inherited]
    if len(own) == len(stages):
        return f"{_method_names(own)} over {total}"
    inherited = [stage for stage in stages if stage.inherited]
    origin = "inherited from the run that this one branched from"
    if not own:
        return f"{total}, all {origin} ({_method_names(inherited)})"
    return (
        f"{_method_names(own)} in {_stage_range(own)} of {total}; "
        f"{_stage_range(inherited)} {origin} ({_method_names(inherited)})"
    )


def split_note(split: str, *, stages: int, ends_stages: bool) -> str:
    """What was chosen on the samples of an evaluation, and so how far its scores can be reported."""
    if split == "validation" and stages > 1:
        ends = " and stages ended by their scores" if ends_stages else ""
        return (
            f"The best stage was chosen on them{ends}, so its score here is somewhat too high; scores of other samples "
            "are not."
        )
    if split == "validation" and ends_stages:
        return (
            "The stage ended by their scores, so the score here is somewhat too high; scores of other samples are not."
        )
    return "They chose nothing: these are the scores to report."


def subject_name(evaluated: Evaluated) -> str:
    """The name of what was scored, for people."""
    if evaluated.subject == "stage" and evaluated.stage is not None:
        return f"after stage {evaluated.stage + 1}"
    if evaluated.subject == "best" and evaluated.stage is not None:
        return f"best student (stage {evaluated.stage + 1})"
    return model_name(evaluated.subject)


def model_name(subject: str) -> str:
    """The name of a model that was scored, for people."""
    return _MODEL_NAMES.get(subject, subject)


def seed_stats_text(stats: SeedStats) -> str:
    """Mean ± sample standard deviation; the mean alone for one seed, which has no deviation."""
    return f"{stats.mean:.2f}" if stats.sd is None else f"{stats.mean:.2f} ± {stats.sd:.2f}"


def _method_names(stages: Sequence[StageFigures]) -> str:
    return ", then ".join(dict.fromkeys(method_name(stage.method) for stage in stages))


def _stage_range(stages: Sequence[StageFigures]) -> str:
    first, last = stages[0].index + 1, stages[-1].index + 1
    return f"stage {first}" if first == last else f"stages {first} to {last}"


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
    sampled = [(place, each.sampled.rouge_l) for place, each in enumerate(scored) if each.sampled is not None]
    if sampled:
        places, stats = zip(*sampled, strict=True)
        means, deviations = [each.mean for each in stats], [each.sd or 0.0 for each in stats]
        axes.errorbar(places, means, yerr=deviations, color=_GREEN, marker="^", capsize=4, label="sampled, ± sd")


def _lengths_plot(data: Sequence[DataEncoded]) -> str:
    """The shares of the samples of each data set by their length before any cut."""
    figure, axes = _figure()
    buckets = sorted({bucket for each in data for bucket in each.counts.lengths})
    width = 0.8 / len(data)
    for index, (each, color) in enumerate(zip(data, cycle((_BLUE, _RED, _GREEN, _GREY)), strict=False)):
        shares = [100 * each.counts.lengths.get(bucket, 0) / max(1, each.counts.rows) for bucket in buckets]
        places = [place + (index - (len(data) - 1) / 2) * width for place in range(len(buckets))]
        axes.bar(places, shares, width, color=color, label=each.part)
    axes.set_xticks(range(len(buckets)), [f"≤ {bucket}" for bucket in buckets])
    axes.set(xlabel="tokens before any cut", ylabel="samples, per cent")
    axes.legend(frameon=False, ncols=4)
    return _svg(figure)


def _difficulty_plot(ranking: Sequence[RankedSample], stages: Sequence[StageFigures], control: Control | None) -> str:
    """The samples by their two measures, in the colour of the stage that first trains on them; empty without any."""
    if not ranking or any(each.cross_entropy is None for each in ranking):
        return ""
    figure, axes = _figure()
    order = ranking[::-1] if isinstance(control, ReversedOrder) else ranking
    first_trained = 0
    shades = [_BLUE, "#4f8fce", "#e09a5b", _RED]
    for stage in stages:
        shade = shades[min(stage.index, len(shades) - 1)]
        _scatter(axes, order[first_trained : stage.samples], shade, label=f"stage {stage.index + 1}")
        first_trained = max(first_trained, stage.samples)
    axes.set(xlabel="cross-entropy of the reference, nats per token", ylabel="ROUGE-L of the answer")
    axes.legend(frameon=False, ncols=4)
    return _svg(figure)


def _scatter(axes: "Axes", samples: Sequence[RankedSample], color: str, *, label: str) -> None:
    # Only measured samples are plotted.
    entropies, scores = [each.cross_entropy or 0.0 for each in samples], [each.rouge_l or 0.0 for each in samples]
    axes.scatter(entropies, scores, s=14, color=color, alpha=0.75, label=label)


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
    # With a fixed salt and no date the same run gives the same bytes.
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "pocl", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
