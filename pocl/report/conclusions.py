"""What a report says first: how good the student became, which weights to take, and what the run does not show."""

from collections.abc import Sequence

from pocl.evaluation.intervals import ScoreDifference
from pocl.events import Evaluated
from pocl.report.names import model_name
from pocl.report.run_comparison import RunComparison

_SMALL_SET = 200
"""With fewer samples the interval of a score is wide enough to be mentioned."""


def describe_conclusions(
    evaluations: Sequence[Evaluated],
    differences: Sequence[ScoreDifference],
    best_stage: int | None,
    *,
    is_control: bool,
    compared_with: RunComparison | None = None,
) -> list[str]:
    """Sentences for people; none where nothing was scored.

    Args:
        best_stage: the stage whose weights are kept as the best; null without validation samples.
        is_control: whether the run is a control experiment itself.
        compared_with: the run that it is compared with; null without one.
    """
    if not evaluations:
        return []
    return [
        *([] if compared_with is None else _what_the_control_took(compared_with)),
        *_gains(differences),
        *_distance_to_teacher(evaluations),
        *_weights_to_take(evaluations, best_stage),
        *_what_is_not_shown(evaluations, is_control=is_control),
    ]


def _gains(differences: Sequence[ScoreDifference]) -> list[str]:
    """What training brought, on the samples that chose nothing where there are such."""
    gains = [each for each in differences if each.compared_with == "initial" and each.metric == "rouge_l"]
    unseen = [each for each in gains if each.split != "validation"] or gains
    said = []
    for each in unseen:
        certain = "" if each.low > 0 or each.high < 0 else ", so maybe nothing"
        verb = "gained" if each.difference >= 0 else "lost"
        said.append(
            f"The {model_name(each.model)} {verb} {abs(each.difference):.2f} points of ROUGE-L over the untrained one"
            f" on {each.rows} {each.split} samples (95 % interval {each.low:+.2f} to {each.high:+.2f}{certain})."
        )
    return said


def _what_the_control_took(compared_with: RunComparison) -> list[str]:
    """How the run without the control fared beside it, whichever way it fell."""
    unseen = [each for each in compared_with.differences if each.split != "validation"] or compared_with.differences
    said = []
    for each in unseen:
        means = "helped" if each.low > 0 else "did harm" if each.high < 0 else "may make no difference"
        place = "above" if each.difference >= 0 else "below"
        said.append(
            f"The final student of the run without the control scored {abs(each.difference):.2f} points of ROUGE-L"
            f" {place} that of the control on {each.rows} {each.split} samples (95 % interval {each.low:+.2f} to"
            f" {each.high:+.2f}): what the control leaves out {means}, as far as one seed can tell."
        )
    return said


def _distance_to_teacher(evaluations: Sequence[Evaluated]) -> list[str]:
    """What share of the way from the untrained student to the teacher the final student has come."""
    scores = {each.subject: each.rouge_l for each in evaluations if each.split == evaluations[0].split}
    if not {"teacher", "initial", "final"} <= scores.keys() or scores["teacher"] <= scores["initial"]:
        return []
    share = (scores["final"] - scores["initial"]) / (scores["teacher"] - scores["initial"])
    return [
        f"At the end it has come {share:.0%} of the way from the untrained student ({scores['initial']:.2f}) to the"
        f" teacher ({scores['teacher']:.2f}) by ROUGE-L."
    ]


def _weights_to_take(evaluations: Sequence[Evaluated], best_stage: int | None) -> list[str]:
    stages = {each.stage: each for each in evaluations if each.subject == "stage" and each.split == "validation"}
    if best_stage is None or best_stage not in stages or len(stages) == 1:
        return []
    last = max(stage for stage in stages if stage is not None)
    best, end = stages[best_stage], stages[last]
    if best_stage == last:
        return ["The last stage is the best one: final/ and best/ hold the same weights."]
    return [
        f"Take best/, the weights after stage {best_stage + 1} (ROUGE-L {best.rouge_l:.2f}, cross-entropy"
        f" {best.cross_entropy:.3f}): after the last stage they score {end.rouge_l:.2f} and {end.cross_entropy:.3f}."
    ]


def _what_is_not_shown(evaluations: Sequence[Evaluated], *, is_control: bool) -> list[str]:
    said = []
    if not is_control:
        said.append(
            "What the curriculum brought, this run alone does not show: compare it with a control of as many steps"
            " (curriculum.control: no_curriculum)."
        )
    if max(each.rows for each in evaluations) < _SMALL_SET:
        said.append("So few samples were scored that another choice of them would move the scores by some points.")
    return said
