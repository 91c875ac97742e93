"""What the report says about a run: which method trained each stage, and whether the run is a control experiment."""

import re
from collections.abc import Sequence
from typing import Any

import pytest

from pocl.curriculum.ranking import RankedSample
from pocl.encoding_counts import EncodingCounts
from pocl.events import DataEncoded, Evaluated, Warned
from pocl.report.comparison import ComparedAnswers
from pocl.report.figures import StageFigures, TrainingCurve
from pocl.report.render import ReportData, describe_stages, render, split_note
from pocl.spec import (
    JS,
    SFT,
    AllSamples,
    ConstantTemperature,
    ConstantWeight,
    Control,
    ForwardKL,
    Method,
    NoCurriculum,
    Ranker,
    ReversedOrder,
    ReverseKL,
    ShuffledStages,
    StudentRanker,
    TeacherRanker,
    WarmStudentRanker,
    describe_control,
)

# It draws plots, which takes seconds.
pytestmark = pytest.mark.system

RANKING = [
    RankedSample(i, f"{i:064x}", 10.0, 2.0, "", rank=i + 1, score=0.1, rank_rouge_l=1, rank_cross_entropy=1)
    for i in range(8)
]


def stages(*methods: Method, inherited: int = 0) -> list[StageFigures]:
    """One stage for each method, of which the first `inherited` come from another run."""
    return [
        StageFigures(
            index=index,
            samples=2 * (index + 1),
            temperature=1.0 + index,
            kd_weight=0.7,
            method=method,
            inherited=index < inherited,
            steps=4,
            end_step=4 * (index + 1),
        )
        for index, method in enumerate(methods)
    ]


def report(
    figures: list[StageFigures],
    control: Control | None = None,
    *,
    ranking: Sequence[RankedSample] = RANKING,
    ranker: Ranker = StudentRanker(),  # noqa: B008 # It is immutable.
    data: Sequence[DataEncoded] = (),
    **more: Any,
) -> str:
    """The text of a report, without its markup and with single spaces."""
    html = render(
        ReportData(
            samples=8,
            control=control,
            tokens_seen=1000,
            stages=figures,
            curve=TrainingCurve(steps=(), loss=(), cross_entropy=(), divergence=(), temperature=()),
            ranking=ranking,
            ranker=ranker,
            heading=("POCL distillation report", "Student: acme/base."),
            provenance={"seed": "10"},
            data=data,
            **{"evaluations": (), **more},
        )
    )
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        (stages(ForwardKL(), ForwardKL()), "forward_kl over 2 stages"),
        (stages(SFT()), "sft over 1 stage"),
        (stages(JS(beta=0.1), JS(beta=0.1)), "js (beta 0.1) over 2 stages"),
        (
            stages(ForwardKL(), JS(), JS(), inherited=1),
            "js in stages 2 to 3 of 3 stages; stage 1 inherited from the run that this one branched from (forward_kl)",
        ),
        (
            stages(ForwardKL(), ReverseKL(), JS(), inherited=2),
            "js in stage 3 of 3 stages; stages 1 to 2 inherited from the run that this one branched from "
            "(forward_kl, then reverse_kl)",
        ),
        (
            stages(ForwardKL(), ForwardKL(), inherited=2),
            "2 stages, all inherited from the run that this one branched from (forward_kl)",
        ),
    ],
)
def test_headline_attributes_each_stage_to_its_method_and_run(figures: list[StageFigures], sentence: str) -> None:
    assert describe_stages(figures) == sentence
    assert f"{sentence}. 8 training samples" in report(figures)


def test_stage_table_names_the_method_of_each_stage() -> None:
    text = report(stages(ForwardKL(), JS(beta=0.1), inherited=1))
    assert "1, inherited forward_kl 2 1.00" in text
    assert "2 js (beta 0.1) 4 2.00" in text


@pytest.mark.parametrize(
    ("control", "sentence"),
    [
        (NoCurriculum(kind="no_curriculum"), "all samples in one stage, at one temperature"),
        (AllSamples(kind="all_samples"), "each stage takes all samples"),
        (ShuffledStages(kind="shuffled_stages"), "the stages take the samples in a random order"),
        (ReversedOrder(kind="reversed_order"), "the stages take the samples from hard to easy"),
        (ConstantTemperature(kind="constant_temperature"), "all stages have one temperature"),
        (ConstantWeight(kind="constant_weight"), "all stages have one KD weight"),
    ],
)
def test_control_experiment_is_described(control: Control, sentence: str) -> None:
    assert describe_control(control) == f"Control experiment {control.kind}: {sentence}."


@pytest.mark.parametrize(
    ("split", "stages", "ends_stages", "note"),
    [
        ("validation", 4, False, "The best stage was chosen on them, so its score here is somewhat too high"),
        ("validation", 4, True, "chosen on them and stages ended by their scores, so its score"),
        ("validation", 1, True, "The stage ended by their scores"),
        ("validation", 1, False, "They chose nothing"),
        ("test", 4, True, "They chose nothing"),
    ],
)
def test_report_says_what_was_chosen_on_the_samples_of_an_evaluation(
    split: str, stages: int, ends_stages: bool, note: str
) -> None:
    assert note in split_note(split, stages=stages, ends_stages=ends_stages)


def test_report_names_the_control_and_has_no_difficulties_where_nothing_was_ranked() -> None:
    text = report(stages(ForwardKL()), AllSamples(kind="all_samples"), ranking=())
    assert "Control experiment all_samples: each stage takes all samples." in text
    assert "Difficulty" not in text


def test_report_says_for_whom_the_samples_were_easy_or_hard() -> None:
    figures = stages(ForwardKL())
    assert "were for the untrained student;" in report(figures)
    assert "were for the teacher;" in report(figures, ranker=TeacherRanker(kind="teacher"))
    warm = WarmStudentRanker(kind="warm_student", steps=7)
    assert "were for a copy of the student after 7 steps of warm-up;" in report(figures, ranker=warm)


def test_report_of_a_curriculum_mentions_no_control() -> None:
    assert "Control experiment" not in report(stages(ForwardKL()))


def test_report_says_what_was_cut_and_left_out_of_each_data_set() -> None:
    train = EncodingCounts(rows=8, tokens=1234, prompts_cut=3, left_out={"tools": 2}, lengths={64: 6, 128: 2})
    held_out = EncodingCounts(rows=2, tokens=50, lengths={32: 2})
    data = [
        DataEncoded(part="train", template="chat", counts=train),
        DataEncoded(part="validation", template="chat", counts=held_out),
    ]
    text = report(stages(SFT()), data=data)
    assert "Data as tokens train validation samples 8 2 tokens 1,234 50 prompts cut 3 0" in text
    assert "left out by the template: tools 2 0" in text
    assert "answers cut" not in text
    assert "≤ 32" in text
    assert "Data as tokens" not in report(stages(SFT()))


def evaluated(unfinished: int) -> Evaluated:
    return Evaluated(
        subject="teacher", rows=8, rouge_l=5.0, exact_match=0.0, cross_entropy=2.0, unfinished_thoughts=unfinished
    )


def test_report_counts_answers_that_ended_inside_their_thought_and_says_which_they_are() -> None:
    answers = ComparedAnswers(
        split="validation",
        prompt="Why?",
        reference="So.",
        answers={"teacher": "", "final": "So"},
        unfinished_thoughts=("teacher",),
    )
    text = report(stages(SFT()), evaluations=[evaluated(3)], answers=[answers])
    assert re.search(r"KL to teacher unfinished thoughts teacher 0 5\.00 0\.0 % 2\.000 \S 3 ", text)
    assert "teacher none: it ended inside its thought final student So" in text
    plain = report(stages(SFT()), evaluations=[evaluated(0)])
    assert "thought" not in plain


def test_report_has_the_warnings_of_the_run_with_what_they_are_about() -> None:
    warnings = [
        Warned(code="samples_cut", message="train: 3 <of> 8 prompts are cut", pointer="/data/train"),
        Warned(code="generation_padded", message="answers are generated in padded batches"),
    ]
    text = report(stages(SFT()), warnings=warnings)
    assert "Warnings samples_cut train: 3 &lt;of&gt; 8 prompts are cut (/data/train) generation_padded answers" in text
    assert "Warnings" not in report(stages(SFT()))
