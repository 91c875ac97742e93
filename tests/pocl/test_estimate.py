"""What a run is estimated to need, beside what torch counts of a run and what its events say of it."""

import json
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from bench.counting import FlopCounter
from pocl.estimate import Estimate, ModelPass, ModelSize, ModelSizes, SetSize, estimate
from pocl.events import DataEncoded, Evaluated, Event, PhaseChanged, StepLogged
from pocl.inspect import random_facts
from pocl.plan import stage_table
from pocl.report import plots
from pocl.run import run
from pocl.spec import RandomModel, resolve

SIZES = {
    "teacher": ModelSize(parameters=10**9, active=9 * 10**8, layers=20, width=2000, vocabulary=1000),
    "student": ModelSize(parameters=10**6, active=9 * 10**5, layers=2, width=100, vocabulary=1000),
}
MODELS = ModelSizes(**SIZES)
BASE: dict[str, Any] = {
    "teacher": {"random": {}},
    "student": {"random": {}},
    "data": {"train": {"path": "a"}, "validation": {"path": "b"}, "test": {"path": "c"}},
}
SETS = {
    "train": SetSize(samples=100, tokens=6000, prompt_tokens=4000, trained_tokens=1500),
    "validation": SetSize(samples=10, tokens=600, prompt_tokens=400, trained_tokens=150),
    "test": SetSize(samples=20, tokens=1200, prompt_tokens=800, trained_tokens=300),
}


def estimated(models: ModelSizes = MODELS, **fields: Any) -> Estimate:
    spec = resolve(BASE | fields)
    return estimate(spec, stage_table(spec, 100), models, SETS)


def passes(estimated: Estimate, **fields: object) -> list[ModelPass]:
    """The passes with these values."""
    return [each for each in estimated.passes if all(getattr(each, name) == fields[name] for name in fields)]


def test_training_costs_six_operations_a_parameter_and_the_heads_where_a_token_is_predicted() -> None:
    student, teacher = MODELS.student, SIZES["teacher"]
    trained = passes(estimated(curriculum={"stages": 2, "epochs_per_stage": 3}), phase="training")
    # 50 samples, then 100, of 60 tokens each, 15 of which are trained on.
    for each, samples in zip(trained, (50, 100), strict=True):
        visits = 3 * samples
        layers = 6 * student.active * 60 + 3 * 4 * student.layers * 60 * 60 * student.width
        heads = 15 * 2 * (3 * student.vocabulary * student.width + teacher.vocabulary * teacher.width)
        assert (each.samples, each.passes, each.tokens) == (samples, 3.0, 60 * visits)
        assert each.flops == visits * (layers + heads)


def test_teacher_passes_each_sample_once_and_not_at_all_where_nothing_needs_it() -> None:
    cached = passes(estimated(), phase="caching_teacher")
    assert {each.part: (each.passes, each.tokens) for each in cached} == {
        "train": (1, 6000), "validation": (1, 600), "test": (1, 1200)
    }  # fmt: skip
    # A student that is fine-tuned is only compared with the teacher.
    assert {each.part for each in passes(estimated(method="sft"), phase="caching_teacher")} == {"validation", "test"}
    alone = estimated(ModelSizes(student=MODELS.student, teacher=None), method="sft", teacher=None)
    assert {each.model for each in alone.passes} == {"student"}
    assert alone.memory_bytes < estimated().memory_bytes
    assert alone.training_flops < estimated().training_flops


def test_model_that_ranks_costs_by_its_own_size_which_may_be_unknown() -> None:
    ranking = {"ranker": {"kind": "model", "model": {"path": "ranker"}}}
    unknown = estimated(curriculum={"ranking": ranking})
    assert [each.flops for each in passes(unknown, model="ranker")] == [None, None]
    assert unknown.flops is None
    known = estimated(replace(MODELS, ranker=SIZES["teacher"]), curriculum={"ranking": ranking})
    by_teacher = estimated(curriculum={"ranking": {"ranker": {"kind": "teacher"}}})
    assert known.flops == by_teacher.flops
    assert known.memory_bytes >= 4 * SIZES["teacher"].parameters


@pytest.mark.parametrize(
    "curriculum", [{"stages": 1}, {"control": {"kind": "all_samples"}}, {"ranking": {"ranker": {"kind": "column"}}}],
    ids=["one stage", "all samples", "column"],
)  # fmt: skip
def test_nothing_ranks_where_no_ranking_is_made_by_a_model(curriculum: dict[str, Any]) -> None:
    assert passes(estimated(curriculum=curriculum), phase="ranking") == []


def test_warm_up_before_the_ranking_trains() -> None:
    warm = estimated(curriculum={"ranking": {"ranker": {"kind": "warm_student", "steps": 5}}})
    (warm_up, *_) = passes(warm, phase="ranking")
    assert (warm_up.work, warm_up.tokens) == ("training", 5 * 64 * 60)
    assert warm.training_flops == estimated().training_flops


def test_sampled_answers_are_generated_once_with_each_seed() -> None:
    plain, sampled = (estimated(evaluation={"sampling": sampling}) for sampling in (None, {"seeds": [1, 2]}))
    for each, other in zip(passes(plain, phase="evaluating"), passes(sampled, phase="evaluating"), strict=True):
        assert other.passes == each.passes * (3 if each.work == "generation" else 1)


def test_answers_end_at_the_last_position() -> None:
    short = replace(MODELS, student=replace(MODELS.student, max_positions=50))
    # Prompts have 40 tokens.
    (initial,) = passes(estimated(short), subject="initial", part="test", work="generation")
    assert initial.tokens == 20 * 50


@dataclass
class Counted:
    """What a run did, by its events and by torch."""

    events: list[Event] = field(default_factory=list)
    flops: Counter[str] = field(default_factory=Counter)
    """By phase."""


def run_counted(raw: dict[str, Any], workdir: Path) -> Counted:
    counted, phase, before = Counted(), "validating", 0
    with FlopCounter() as counter:

        def sink(event: Event) -> None:
            nonlocal phase, before
            counted.events.append(event)
            if isinstance(event, PhaseChanged):
                counted.flops[phase] += counter.flops - before
                phase, before = event.phase, counter.flops

        run(resolve(raw), workdir, sink)
    return counted


def write_rows(path: Path, rows: int, seed: int) -> dict[str, str]:
    draw = random.Random(seed)
    words = ["red", "blue", "one", "two", "cat", "dog", "sun", "sea"]
    with path.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            chosen = " ".join(draw.choices(words, k=draw.randint(12, 30)))
            out.write(json.dumps({"instruction": chosen, "output": chosen[: draw.randint(20, 60)]}) + "\n")
    return {"path": str(path)}


TEACHER = {"layers": 2, "hidden_size": 256}
STUDENT = {"layers": 1, "hidden_size": 192, "seed": 1}


@pytest.mark.system
def test_operations_of_each_phase_are_those_that_torch_counts_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # To draw the plots takes longer than to run.
    monkeypatch.setattr(plots, "_svg", lambda _figure: "<svg></svg>")
    raw = {
        "preset": "quick",
        "teacher": {"random": TEACHER},
        "student": {"random": STUDENT},
        "data": {
            "train": write_rows(tmp_path / "train.jsonl", 24, 0),
            "validation": write_rows(tmp_path / "validation.jsonl", 3, 1),
            "test": write_rows(tmp_path / "test.jsonl", 2, 2),
            "max_length": 320,
            "max_prompt_length": 256,
        },
        "curriculum": {"stages": 2, "ranking": {"max_new_tokens": 6}},
        # Products in bf16 are such on a CPU that torch does not count.
        "training": {"precision": "fp32"},
        "evaluation": {"max_new_tokens": 6, "sampling": {"seeds": [1]}},
        "resources": {"device": "cpu", "threads": 1},
    }
    counted = run_counted(raw, tmp_path / "run")
    spec = resolve(raw)
    encoded = {each.part: each.counts for each in counted.events if isinstance(each, DataEncoded)}
    planned = estimate(
        spec,
        stage_table(spec, 24),
        ModelSizes(*(ModelSize.of(random_facts(RandomModel(**each))) for each in (STUDENT, TEACHER))),
        {part: SetSize.as_counted(counts.rows, counts) for part, counts in encoded.items()},
    )
    by_phase: Counter[str] = Counter()
    for each in planned.passes:
        assert each.flops is not None
        by_phase[each.phase] += each.flops
    for phase, flops in by_phase.items():
        # The teacher's last batch of each length is filled up, which matters where samples are few.
        few = 0.25 if phase == "caching_teacher" else 0.15
        assert counted.flops[phase] == pytest.approx(flops, rel=few), phase

    evaluated = Counter(
        (each.subject, each.split)
        for each in counted.events
        if isinstance(each, Evaluated) and each.subject in ("teacher", "initial", "stage")
    )
    most = {(each.subject, each.part): each.passes for each in passes(planned, phase="evaluating", work="scoring")}
    assert set(evaluated) == set(most)
    assert all(count <= most[key] for key, count in evaluated.items())
    tokens = [each.tokens_seen for each in counted.events if isinstance(each, StepLogged)][-1]
    assert tokens == pytest.approx(sum(each.tokens for each in passes(planned, phase="training")), rel=0.05)
