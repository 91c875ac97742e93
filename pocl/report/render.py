"""The HTML report of a run: one self-contained file with its plots inside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined

from pocl.curriculum.ranking import RankedSample
from pocl.evaluation.intervals import ScoreDifference
from pocl.events import DataEncoded, Evaluated, SeedStats, Warned
from pocl.layout import REPORT_FILE
from pocl.report.comparison import ComparedAnswers
from pocl.report.conclusions import describe_conclusions
from pocl.report.figures import StageFigures, TrainingCurve
from pocl.report.names import model_name, subject_name
from pocl.report.plots import (
    draw_cross_entropy,
    draw_difficulty,
    draw_lengths,
    draw_loss,
    draw_rouge_l,
    draw_temperature,
)
from pocl.report.run_comparison import RunComparison
from pocl.spec import Control, Ranker, ReversedOrder, describe_control, describe_ranker, method_name

_METRIC_NAMES = {
    "rouge_l": "ROUGE-L, points",
    "exact_match": "exact match, points",
    "cross_entropy": "cross-entropy, nats (less is better)",
}


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
    heading: Sequence[str]
    """Name of the run, and sentences on its models and its time."""
    provenance: Mapping[str, str | None]
    """What the run can be reproduced from: digests, versions, seed."""
    compared_with: RunComparison | None = None
    """The run that the control is compared with; null without one."""
    differences: Sequence[ScoreDifference] = ()
    """By how much the trained student scores above the others."""
    answers: Sequence[ComparedAnswers] = ()
    """Answers of all models to the first samples of each set."""
    warnings: Sequence[Warned] = ()
    """What is to be known of specification, data, models and answers."""
    not_exact: Sequence[str] = ()
    """Why the run may end in other bits when it is repeated or resumed."""
    data: Sequence[DataEncoded] = ()
    """What was cut and left out of each data set."""
    validation_ends_stages: bool = False
    """Whether stages ended by the scores on the validation samples."""
    best_stage: int | None = None
    """The stage whose weights are kept as the best; null without validation samples."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What the run was trained with besides the stages, such as the learning rate."""


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
    order = data.ranking[::-1] if isinstance(data.control, ReversedOrder) else data.ranking
    return environment.get_template(REPORT_FILE).render(
        title=data.heading[0],
        facts=data.heading[1:],
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
        conclusions=describe_conclusions(
            data.evaluations,
            data.differences,
            data.best_stage,
            is_control=bool(data.control),
            compared_with=data.compared_with,
        ),
        compared_with={each.split: each for each in data.compared_with.evaluations} if data.compared_with else {},
        settings=data.settings,
        training_plots=[draw_loss(data.curve, data.stages), draw_temperature(data.curve, data.stages)],
        score_plots=[draw_rouge_l(plotted), draw_cross_entropy(plotted)] if plotted else [],
        difficulty_plots=draw_difficulty(order, data.stages),
        ranker=describe_ranker(data.ranker),
        data=data.data,
        data_rows=data_rows(data.data),
        lengths_plot=draw_lengths(data.data) if data.data else "",
        provenance=data.provenance,
        not_exact=data.not_exact,
        warnings=data.warnings,
        unfinished_thoughts=any(each.unfinished_thoughts for each in data.evaluations),
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


def seed_stats_text(stats: SeedStats) -> str:
    """Mean ± sample standard deviation; the mean alone for one seed, which has no deviation."""
    return f"{stats.mean:.2f}" if stats.sd is None else f"{stats.mean:.2f} ± {stats.sd:.2f}"


def _method_names(stages: Sequence[StageFigures]) -> str:
    return ", then ".join(dict.fromkeys(method_name(stage.method) for stage in stages))


def _stage_range(stages: Sequence[StageFigures]) -> str:
    first, last = stages[0].index + 1, stages[-1].index + 1
    return f"stage {first}" if first == last else f"stages {first} to {last}"
